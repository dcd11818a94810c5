import functools
import logging
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_treespec.integration import plugin, seams
from vllm_treespec.integration.engine_args import has_trees
from vllm_treespec.integration.seams import (
    HOOKS,
    PATCHES,
    FieldPatch,
    Hook,
    Patch,
    SeamError,
)

ROOT = Path(__file__).parents[2]
TARGET = str(ROOT / "models/python-stdlib/target")


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


@pytest.fixture
def plain(monkeypatch, caplog):
    """vLLM as it is without us, and at the end as it was before."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    # Other tests of this process may have made vLLM's log quiet.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="vllm")
    were_installed = bool(seams._installed)
    uninstall()
    yield
    monkeypatch.undo()  # what a test moved would keep ours out
    uninstall()
    if were_installed:
        seams.install()


def uninstall():
    for patch in PATCHES:
        patch.uninstall()
    seams._installed.clear()


def engine_config(speculative_config):
    args = EngineArgs(
        model=TARGET,
        dtype="float32",
        enforce_eager=True,
        speculative_config=speculative_config,
    )
    return args.create_engine_config()


def looks():
    return [
        seam._find()[0][seam._find()[1]]
        if isinstance(seam, FieldPatch)
        else seams._resolve(seam.target)[2]
        for seam in PATCHES
    ]


def test_one_seam_that_moved_leaves_vllm_as_it_is_and_refuses_only_us(
    plain, monkeypatch, caplog
):
    with monkeypatch.context() as moved:
        moved.setattr(Scheduler, "make_stats", lambda self, other: None)
        before = looks()
        plugin.register()
        assert looks() == before
        (record,) = caplog.records
        message = record.getMessage()
        assert record.levelname == "WARNING"
        assert "Scheduler.make_stats is " in message and "('self', 'other')" in message
        assert (
            plugin.SUPPORTED in message and "'method: treespec' is refused" in message
        )
        ngram = {"method": "ngram", "num_speculative_tokens": 3}
        assert engine_config(ngram).speculative_config.method == "ngram"
        with pytest.raises(ValueError, match="treespec"):
            engine_config({"method": "treespec"})
    plugin.register()
    assert has_trees(engine_config({"method": "treespec"}))


def test_a_module_that_is_gone_is_a_seam_that_moved(plain, monkeypatch, caplog):
    gone = Hook("vllm.no_such_module:call", (), why="test")
    monkeypatch.setattr(seams, "PATCHES", (*PATCHES, gone))
    before = looks()
    plugin.register()
    assert looks() == before
    assert "no_such_module" in caplog.text


def with_wraps(original):
    @functools.wraps(original)
    def create(*args, **kwargs):
        return original(*args, **kwargs)

    return create


def without_wraps(original):
    return lambda self, *args, **kwargs: original(self, *args, **kwargs)


@pytest.mark.parametrize("wrapper", [with_wraps, without_wraps])
@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_another_plugin_may_wrap_what_we_wrap(
    plain, monkeypatch, caplog, wrapper, first
):
    if first == "ours":
        plugin.register()
    own = EngineArgs.create_engine_config
    monkeypatch.setattr(EngineArgs, "create_engine_config", wrapper(own))
    plugin.register()
    assert "treespec" not in caplog.text
    assert has_trees(engine_config({"method": "treespec"}))
    assert not has_trees(engine_config(None))
    monkeypatch.undo()  # before ours are taken away


def test_who_asks_for_less_than_vllm_gives_is_named(plain, monkeypatch, caplog):
    def narrow(self, usage_context):
        raise AssertionError("nobody builds an engine here")

    monkeypatch.setattr(EngineArgs, "create_engine_config", narrow)
    plugin.register()
    assert f"{__name__}.test_who_asks" in caplog.text


def test_the_supported_range_is_the_one_that_is_installed():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (cuda,) = pyproject["project"]["optional-dependencies"]["cuda"]
    low, high = map(int, re.findall(r"0\.(\d+)", cuda))
    assert f"0.{low} and 0.{high - 1}" == plugin.SUPPORTED
