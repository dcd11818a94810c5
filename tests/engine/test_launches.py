"""What a decode step launches in the real engine, outside of the models' forwards."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from vllm_treespec.integration import model_state, rejection_sampler
from vllm_treespec.testing.launches import Launches

PROMPTS = [[random.Random(seed).randrange(2, 97) for _ in range(20)] for seed in (1, 2)]
MAX_TOKENS = 24


def during(launches: Launches, phase: str, function: Callable[..., Any]) -> Any:
    def counted(*args: Any, **options: Any) -> Any:
        with launches.during(phase):
            return function(*args, **options)

    return counted


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()
    for phase, module, name in (
        ("verify", rejection_sampler, "walk_target"),
        ("commit", model_state, "commit_paths"),
    ):
        wrapped = during(launches, phase, getattr(module, name))
        monkeypatch.setattr(module, name, wrapped)
    return launches


def test_ten_launches_around_the_drafts(
    launches: Launches,
    start: Callable[..., Any],
    model_path: Callable[[str], str],
):
    tree = {"proposers": [{"type": "recycle"}, {"type": "suffix"}], "adaptive": False}
    engine = start(model_path("llama"), tree=tree, max_num_seqs=4)
    speculator = engine.runner.speculator
    speculator.kernels = launches.wrap(speculator.kernels)
    speculator.builder._kernels = speculator.kernels
    steps: Counter[str] = Counter()
    for phase, owner, name in (
        ("observe", speculator._reporter, "verified"),
        ("learn", speculator, "_learn"),
        ("build", speculator, "_build"),
    ):
        counted = during(launches, phase, getattr(owner, name))

        def method(
            *args: Any, counted: Any = counted, name: str = name, **o: Any
        ) -> Any:
            steps[name] += 1
            return counted(*args, **o)

        setattr(owner, name, method)
    with launches:
        engine.greedy(PROMPTS, MAX_TOKENS, ignore_eos=True)
    verified, built = steps["verified"], steps["_build"]
    assert verified > 4 and steps["_learn"] == built
    assert launches["verify"] == verified
    # The copy to the host, and nothing to count.
    assert launches["observe"] == verified
    assert launches["commit"] == verified
    assert launches["build"] == 4 * built
    assert launches["learn"] <= 2 * built + verified  # and what proposers are worth
