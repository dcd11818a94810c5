"""``recycle`` in the engine: alone and beside others, the tokens stay the target's."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

RECYCLE = {"type": "recycle", "k": 6, "depth": 5}


def tree_of(*proposers, **options):
    return {"proposers": list(proposers), "adaptive": False, **options}


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("others", [[], ["suffix"], ["draft_model"]])
def test_greedy_tokens_are_those_of_no_speculation(
    others, async_scheduling, model_path, draft_path, prompts, start, acceptance
):
    batch = prompts(6)
    options = {"async_scheduling": async_scheduling}
    plain = start(model_path("llama"), **options).greedy(batch, 48)
    known = {
        "suffix": {"type": "suffix"},
        "draft_model": {"type": "draft_model", "model": draft_path("llama"), "depth": 3},
    }
    engine = start(
        model_path("llama"),
        tree=tree_of(RECYCLE, *(known[name] for name in others)),
        num_speculative_tokens=10,
        **options,
    )
    assert engine.greedy(batch, 48) == plain
    # What was said once is in the table, which makes the second time easier.
    before = len(acceptance.lengths)
    assert engine.greedy(batch, 48) == plain
    assert sum(acceptance.lengths[before:]) > 0
    assert engine.runner.speculator.recycle is not None  # was not dismissed
