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


def watch(launches: Launches, owner: Any, **phases: str) -> Counter[str]:
    """Count what these methods launch, in phases; returns their calls."""
    calls: Counter[str] = Counter()
    for name, phase in phases.items():
        counted = during(launches, phase, getattr(owner, name))

        def method(
            *args: Any, counted: Any = counted, name: str = name, **o: Any
        ) -> Any:
            calls[name] += 1
            return counted(*args, **o)

        setattr(owner, name, method)
    return calls


def test_ten_launches_around_the_drafts(
    launches: Launches,
    start: Callable[..., Any],
    model_path: Callable[[str], str],
):
    tree = {"proposers": [{"type": "recycle"}, {"type": "suffix"}], "adaptive": False}
    engine = start(model_path("llama"), tree=tree, max_num_seqs=4)
    speculator = engine.runner.speculator
    recycle = speculator.drafts.recycle
    speculator.kernels = kernels = launches.wrap(speculator.kernels)
    speculator.builder._kernels = recycle._kernels = kernels
    recycle.recycler._kernels = recycle.recycler.rates._kernels = kernels
    verified = watch(launches, speculator._reporter, verified="observe")
    steps = watch(launches, speculator, _learn="learn", _build="build")
    drafted = watch(
        launches, recycle, add_prompt="prompt", learn="recycle", propose="recycle"
    )
    with launches:
        engine.greedy(PROMPTS, MAX_TOKENS, ignore_eos=True)
    num_verified, built = verified["verified"], steps["_build"]
    assert num_verified > 4 and steps["_learn"] == built
    assert launches["verify"] == num_verified
    # The copy to the host, and nothing to count. Nothing is learned in front of it.
    assert launches["observe"] == num_verified
    assert launches["commit"] == num_verified
    assert launches["build"] == 4 * built
    assert launches["learn"] <= 2 * built + num_verified  # and what proposers are worth
    names = launches.names["recycle"]
    assert names.pop("fit_rates", 0) <= num_verified // 16
    grown = dict.fromkeys(("read_roots", "grow_paths"), drafted["propose"])
    taught = ("read_nodes", "learn_rates", "topk", "weigh_successors", "sort")
    learned = dict.fromkeys((*taught, "blend_successors"), num_verified)
    assert dict(names) == grown | learned
    each = {"weigh_successors": 1, "sort": 1, "blend_successors": 1}
    prompts = drafted["add_prompt"]
    assert prompts == len(PROMPTS)
    assert dict(launches.names["prompt"]) == {
        name: count * prompts for name, count in each.items()
    }
