"""Requests that sample draw their children; the others must not notice."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from vllm_treespec.integration.sampled_drafts import SampledDrafts


@pytest.fixture
def placed(monkeypatch):
    """Drawn nodes of every tree that was built with draws."""
    counts = []
    original = SampledDrafts.place

    def place(self, slots, *args):
        original(self, slots, *args)
        counts.extend(self.draws.drawn[slots].sum(1).tolist())

    monkeypatch.setattr(SampledDrafts, "place", place)
    return counts


def params(temperature, seed=None, max_tokens=16):
    return SamplingParams(
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        detokenize=False,
        ignore_eos=True,
    )


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize(
    ("rule", "draw"),
    [("traversal", "without_replacement"), ("without_replacement", "mixed")],
)
def test_greedy_and_seeded_requests_beside_drawing_ones_keep_their_tokens(
    rule,
    draw,
    async_scheduling,
    model_path,
    draft_path,
    prompts,
    start,
    placed,
    acceptance,
):
    batch = prompts(6)
    kinds = [params(0.0), params(1.0, seed=3), params(0.9)] * 2
    options = {"async_scheduling": async_scheduling}
    plain = start(model_path("llama"), **options).generate(batch, kinds)
    draft = {"type": "draft_model", "model": draft_path("llama"), "depth": 3}
    engine = start(
        model_path("llama"),
        tree={
            "proposers": [{"type": "suffix"}, {**draft, "width": 3, "top_k": 4}],
            "verify": rule,
            "draw": draw,
            "adaptive": False,
        },
        num_speculative_tokens=10,
        **options,
    )
    found = engine.generate(batch, kinds)
    for place in (0, 1, 3, 4):
        assert found[place] == plain[place]
    for place in (2, 5):
        assert len(found[place][0]) == 16
    # Half of the nodes are for the suffix proposer.
    assert 0 < max(placed) <= 5
    assert min(placed) == 0
    assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0
    assert sum(acceptance.lengths) > 0  # as they were counted, step by step


def test_without_memory_for_distributions_sampling_walks(
    model_path, draft_path, prompts, start, placed
):
    draft = {"type": "draft_model", "model": draft_path("llama"), "width": 2}
    engine = start(
        model_path("llama"), tree={"proposers": [draft], "draft_logits_gib": 0}
    )
    assert len(engine.generate(prompts(2), params(1.0))[0][0]) == 16
    assert not placed


def test_more_sampled_requests_than_blocks(
    model_path, draft_path, prompts, start, placed
):
    """97 tokens, 4 rows and 4 bytes: room for two requests and no more."""
    draft = {
        "type": "draft_model",
        "model": draft_path("llama"),
        "depth": 2,
        "width": 3,
    }
    engine = start(
        model_path("llama"),
        tree={"proposers": [draft], "draft_logits_gib": 2.5 * 97 * 4 * 4 / 2**30},
    )
    outputs = engine.generate(prompts(5), params(1.0))
    assert all(len(choices[0]) == 16 for choices in outputs)
    assert max(placed) > 0
    assert min(placed) == 0


def test_sampled_requests_come_and_go_and_are_preempted(
    model_path, draft_path, prompts, start, placed
):
    draft = {
        "type": "draft_model",
        "model": draft_path("llama"),
        "depth": 3,
        "width": 3,
    }
    engine = start(
        model_path("llama"),
        tree={"proposers": [draft], "adaptive": False},
        block_size=32,
        num_gpu_blocks_override=14,
        max_num_seqs=6,
    )
    kinds = [params(1.0, max_tokens=50), params(0.0, max_tokens=50)] * 4
    outputs = engine.generate(prompts(8, shortest=20, longest=40), kinds)
    assert all(len(choices[0]) == 50 for choices in outputs)
    assert engine.metric("vllm:num_preemptions") > 0
    assert max(placed) > 0
