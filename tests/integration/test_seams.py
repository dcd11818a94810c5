import sys
import types

import pytest

from vllm_treespec.integration.seams import HOOKS, PATCHES, Hook, Patch, SeamError


@pytest.fixture
def module(monkeypatch):
    fake = types.ModuleType("fake_vllm")
    fake.build = lambda config, device: ("original", config, device)
    monkeypatch.setitem(sys.modules, "fake_vllm", fake)
    return fake


def wrap(original):
    return lambda config, device: ("wrapped", original(config, device))


def patch(*parameters, target="fake_vllm:build"):
    return Patch(target, parameters, wrap, why="test")


def test_installs_once_and_restores(module):
    original = module.build
    seam = patch("config", "device")
    seam.install()
    seam.install()
    assert module.build(1, 2) == ("wrapped", ("original", 1, 2))
    seam.uninstall()
    assert module.build is original


def test_refuses_a_changed_signature(module):
    with pytest.raises(SeamError, match=r"takes \('config', 'device'\)"):
        patch("device").install()
    assert module.build(1, 2)[0] == "original"


def test_refuses_a_missing_target(module):
    with pytest.raises(SeamError, match="fake_vllm:gone is gone"):
        patch(target="fake_vllm:gone").install()


def test_a_hook_may_gain_parameters_but_not_lose_them(module):
    Hook("fake_vllm:build", ("config",), why="test").check()
    with pytest.raises(SeamError, match="expects"):
        Hook("fake_vllm:build", ("config", "device", "more"), why="test").check()


@pytest.mark.parametrize(
    "seam", [*PATCHES, *HOOKS], ids=lambda seam: seam.target.split(":")[1]
)
def test_every_seam_fits_the_installed_vllm(seam):
    seam.check()
    assert seam.why
