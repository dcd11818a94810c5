"""Sessions with streamed input: each turn goes on where the last one ended."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input

LENGTHS = [9, 10, 11]


def session(engine: Any, turns: list[list[int]]) -> list[list[int]]:
    """What is said in each turn; a turn is fed once the last one has ended."""
    llm_engine, said = engine.llm.llm_engine, []
    for turn, length in zip(turns, LENGTHS, strict=True):
        request = llm_engine.input_processor.process_inputs(
            request_id="session",
            prompt=tokens_input(list(turn)),
            params=SamplingParams(
                max_tokens=length, temperature=0.0, detokenize=False, ignore_eos=True
            ),
            supported_tasks=("generate",),
            resumable=True,
        )
        request.request_id = "session"
        llm_engine.engine_core.add_request(request)
        answer: list[int] = []
        while len(answer) < length:
            for output in llm_engine.engine_core.get_output().outputs:
                answer += output.new_token_ids
        said.append(answer)
    return said


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_turn_that_ends_inside_an_accepted_path_changes_no_later_turn(
    async_scheduling, model_path, draft_path, prompts, start, acceptance
):
    turns = prompts(3, 5, 30, seed=21)
    plain = session(start(model_path("llama"), async_scheduling=False), turns)
    model = {"type": "draft_model", "model": draft_path("llama"), "depth": 4}
    engine = start(
        model_path("llama"),
        tree={"proposers": [model, {"type": "suffix"}]},
        async_scheduling=async_scheduling,
    )
    assert session(engine, turns) == plain
    accepted = sum(acceptance.lengths)
    emitted = sum(1 + length for length in acceptance.lengths)
    assert accepted > 5
    assert emitted > sum(LENGTHS) - len(LENGTHS), "a turn ended inside a path"
