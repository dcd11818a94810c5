"""What is returned beside each token: of the accepted path's rows, not of the first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams


def experts_of(engine: Any, batch: list[list[int]]) -> list[Any]:
    """Of every answer: its tokens, and the experts of the prompt's and its own."""
    params = SamplingParams(max_tokens=24, temperature=0.0, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in batch]
    outputs = engine.llm.generate(asked, params, use_tqdm=False)
    return [
        (list(each.outputs[0].token_ids), np.asarray(each.outputs[0].routed_experts))
        for each in outputs
    ]


SKIP = {"attention": [], "mlp": [1]}
DRAFTS = {
    "planted": None,
    "layer_skip": {"type": "layer_skip", "depth": 3, "width": 3, "skip": SKIP},
    "draft_model": {"type": "draft_model", "depth": 3, "width": 3},
}


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_routed_experts_are_those_of_the_tokens_they_are_returned_with(
    drafts, async_scheduling, model_path, draft_path, prompts, start, acceptance
):
    batch = prompts(4)
    options = {"enable_return_routed_experts": True, "enable_prefix_caching": True}
    plain = experts_of(start(model_path("mixtral"), **options), batch)
    proposer = DRAFTS[drafts]
    if drafts == "draft_model":
        proposer = {**proposer, "model": draft_path("llama")}
    truths = [prompt + said for prompt, (said, _) in zip(batch, plain, strict=True)]
    engine = start(
        model_path("mixtral"),
        tree={"proposers": [proposer]} if proposer else {},
        truths=None if proposer else truths,
        async_scheduling=async_scheduling,
        **options,
    )
    for (said, experts), (expected, routes) in zip(
        experts_of(engine, batch), plain, strict=True
    ):
        assert said == expected
        np.testing.assert_array_equal(experts, routes)
    if drafts != "draft_model":  # another family, which only has to start
        assert acceptance.off_first_branch > 3
