"""Who may learn what from whom: memories are kept apart by vLLM's ``cache_salt``."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

SUFFIX, RECYCLE = {"type": "suffix"}, {"type": "recycle"}


def accepted(engine: Any, prompt: list[int], salt: str | None, **extra: Any) -> float:
    """Nodes that its answer took from drafts."""
    name = "vllm:spec_decode_num_accepted_tokens"
    before = engine.metric(name)
    asked: dict[str, Any] = {"prompt_token_ids": prompt}
    if salt is not None:
        asked["cache_salt"] = salt
    params = SamplingParams(
        max_tokens=60,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra or None,
    )
    engine.llm.generate([asked], params, use_tqdm=False)
    return engine.metric(name) - before


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("first", ["a", None])
def test_what_was_asked_under_one_salt_speeds_up_nobody_elses_answer(
    first, async_scheduling, model_path, prompts, start
):
    (prompt,) = prompts(1, shortest=30, seed=5)
    engine = start(
        model_path("llama"),
        tree={"proposers": [SUFFIX], "adaptive": False},
        num_speculative_tokens=24,
        async_scheduling=async_scheduling,
    )
    unknown = accepted(engine, prompt, first)
    assert accepted(engine, prompt, "b") <= unknown + 2
    assert accepted(engine, prompt, None if first else "c") <= unknown + 2
    assert accepted(engine, prompt, first) > unknown + 20


def test_the_table_of_successors_is_of_requests_without_a_salt(
    model_path, prompts, start
):
    (prompt,) = prompts(1, shortest=30, seed=5)
    engine = start(
        model_path("llama"),
        tree={"proposers": [RECYCLE], "adaptive": False},
        num_speculative_tokens=24,
    )
    assert accepted(engine, prompt, "a") == 0
    unknown = accepted(engine, prompt, None)
    assert accepted(engine, prompt, "b") == 0
    assert accepted(engine, prompt, None) > unknown


@pytest.mark.parametrize("proposer", [SUFFIX, RECYCLE], ids=lambda each: each["type"])
def test_a_request_that_is_not_remembered_speeds_up_no_later_one(
    proposer, model_path, prompts, start
):
    (prompt,) = prompts(1, shortest=30, seed=5)
    engine = start(
        model_path("llama"),
        tree={"proposers": [proposer], "adaptive": False},
        num_speculative_tokens=24,
    )
    forgotten = accepted(engine, prompt, None, treespec_remember=False)
    unknown = accepted(engine, prompt, None, treespec_remember=False)
    assert unknown <= forgotten + 2
    remembered = accepted(engine, prompt, None, treespec_remember=0)  # by HTTP
    assert remembered <= forgotten + 2
    accepted(engine, prompt, None)
    assert accepted(engine, prompt, None) > unknown + 10


def test_salted_and_shared_requests_of_one_batch_teach_apart(
    model_path, prompts, start, plain_greedy
):
    batch = [prompt * 2 for prompt in prompts(6, longest=20)]
    plain = plain_greedy(model_path("llama"), batch, 24)
    engine = start(
        model_path("llama"),
        tree={"proposers": [SUFFIX, RECYCLE], "adaptive": False},
    )
    params = SamplingParams(max_tokens=24, temperature=0.0, detokenize=False)
    salts = ["a", "b", None] * 2
    asked = [
        {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}
        for prompt, salt in zip(batch, salts, strict=True)
    ]
    for _ in range(2):
        outputs = engine.llm.generate(asked, params, use_tqdm=False)
        assert [list(each.outputs[0].token_ids) for each in outputs] == plain
    assert engine.metric("vllm:treespec_proposer_faults") == 0
