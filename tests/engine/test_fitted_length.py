"""Lengths that vLLM fits to the KV cache, after the models were made."""

from __future__ import annotations

import pytest

SKIP = {"attention": [], "mlp": [1]}
DRAFTS = {
    "draft_model": {"depth": 6, "width": 4},
    "layer_skip": {"depth": 3, "width": 3, "skip": SKIP},
    "suffix": {},
    "recycle": {},
}


@pytest.mark.parametrize("kind", DRAFTS)
def test_requests_that_end_at_a_fitted_length_keep_their_tokens_and_drafts(
    kind, model_path, draft_path, prompts, start, plain_greedy, acceptance
):
    drafts = {"type": kind, **DRAFTS[kind]}
    if kind == "draft_model":
        drafts["model"] = draft_path("llama")
    options = {"max_num_seqs": 2}
    engine = start(
        model_path("llama"),
        tree={"proposers": [drafts]},
        max_model_len=-1,
        kv_cache_memory_bytes=2**19,
        **options,
    )
    length = engine.runner.max_model_len
    assert length < 512, "the cache holds less than the model's own length"
    (text,) = prompts(1, length, length)
    batch = [text[: length - room] for room in (30, 9, 3, 2)]
    said = engine.greedy(batch, length, ignore_eos=True)
    assert engine.metric("vllm:treespec_proposer_faults") == 0
    if kind != "suffix":
        assert sum(acceptance.lengths) > 0
    plain = plain_greedy(
        model_path("llama"),
        batch,
        length,
        {"ignore_eos": True},
        max_model_len=length,
        **options,
    )
    assert said == plain
