"""Greedy output through the real engine is, token for token, that of no speculation.

Trees come from an adversary that plants the true continuation on random branches and
garbage elsewhere, so every test also shows that paths were accepted off the first one.
"""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from vllm import SamplingParams

from vllm_treespec.testing.planted import PlantedProposer


def truths_of(prompts, outputs):
    return [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]


@pytest.fixture
def check(start, plain_greedy, acceptance):
    """Run prompts plainly, then on planted trees with the same engine options."""

    def check(
        model,
        prompts,
        *,
        max_tokens=24,
        tree=None,
        nodes=8,
        seed=0,
        params=None,
        **options,
    ):
        sampling = params or {}
        plain = plain_greedy(model, prompts, max_tokens, params, **options)
        engine = start(
            model,
            truths=truths_of(prompts, plain),
            tree=tree,
            num_speculative_tokens=nodes,
            seed=seed,
            **options,
        )
        assert engine.greedy(prompts, max_tokens, **sampling) == plain
        assert engine.proposers[0].num_planted > 0
        return engine

    return check


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "mistral", "gemma2", "mixtral"]
)
def test_every_architecture_keeps_its_tokens(
    architecture, model_path, prompts, check, acceptance
):
    check(model_path(architecture), prompts(), nodes=12, max_tokens=32)
    assert acceptance.off_first_branch > 0
    assert max(acceptance.lengths) > 2


def test_attention_sinks(model_path, prompts, check, start, acceptance):
    engine = check(model_path("granite-sinks"), prompts(), nodes=12, max_tokens=32)
    assert acceptance.off_first_branch > 0
    # The sinks matter: they were loaded, and tokens depend on them.
    layers = engine.runner.model.model.layers
    assert all(layer.self_attn.sinks.max() == 3 for layer in layers)
    before = engine.greedy(prompts(), 32)
    for layer in layers:
        layer.self_attn.sinks.fill_(-torch.inf)
    assert engine.greedy(prompts(), 32) != before


@pytest.mark.usefixtures("fp8_caches")
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_quantized_caches(
    kv_cache_dtype, kernels, model_path, prompts, check, acceptance
):
    engine = check(
        model_path("llama"),
        prompts(3, longest=30),
        max_tokens=12,
        tree={"kernels": kernels},
        kv_cache_dtype=kv_cache_dtype,
    )
    caches = [
        layer.self_attn.attn.kv_cache for layer in engine.runner.model.model.layers
    ]
    assert {cache.element_size() for cache in caches} == {1}
    assert acceptance.off_first_branch > 0


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_interpreted_triton_kernels_keep_their_tokens(
    architecture, model_path, prompts, check, acceptance
):
    check(
        model_path(architecture),
        prompts(3, longest=30),
        max_tokens=12,
        tree={"kernels": "triton"},
    )
    assert acceptance.off_first_branch > 0


@pytest.mark.parametrize("nodes", [1, 2, 31, 70])
def test_any_number_of_nodes(nodes, model_path, prompts, check, acceptance):
    check(model_path("llama"), prompts(), nodes=nodes, seed=nodes)
    assert sum(acceptance.lengths) > 0
    if nodes > 2:
        assert acceptance.off_first_branch > 0


def test_tokens_are_those_of_transformers(model_path, prompts, start, acceptance):
    """An oracle outside vLLM, so that plain and tree decoding cannot share a mistake."""
    batch = prompts(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path("llama"))
    truths = [
        model.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )[0].tolist()
        for prompt in batch
    ]
    engine = start(model_path("llama"), truths=truths)
    outputs = engine.greedy(batch, 24)
    assert truths_of(batch, outputs) == truths
    assert acceptance.off_first_branch > 0


def test_a_single_request(model_path, prompts, check, acceptance):
    check(model_path("llama"), prompts(1), max_tokens=60)
    assert acceptance.off_first_branch > 0


def test_more_requests_than_the_batch_holds(model_path, prompts, check, acceptance):
    check(model_path("llama"), prompts(9), max_num_seqs=3, max_tokens=16)
    assert acceptance.off_first_branch > 0


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_async_scheduling(architecture, model_path, prompts, check, acceptance):
    engine = check(model_path(architecture), prompts(), async_scheduling=True)
    assert type(engine.scheduler).__name__ == "AsyncScheduler"
    assert acceptance.off_first_branch > 0


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_shared_prefixes_are_cached_as_committed(
    async_scheduling, model_path, prompts, start, acceptance
):
    """A wrong commit would poison the cache, and the next request would read it."""
    prefix = prompts(1, shortest=70, longest=70, seed=7)[0]
    first = [prefix + tail for tail in prompts(4, shortest=1, longest=9)]
    options = {
        "enable_prefix_caching": True,
        "block_size": 32,
        "async_scheduling": async_scheduling,
    }
    plain = start(model_path("llama"), **options)
    answers = plain.greedy(first, 48)
    # The next turn repeats the answer, whose KV was committed from trees.
    second = [p + a + [5, 6] for p, a in zip(first, answers, strict=True)]
    follow_ups = plain.greedy(second, 24)

    truths = truths_of(first, answers) + truths_of(second, follow_ups)
    engine = start(model_path("llama"), truths=truths, **options)
    assert engine.greedy(first, 48) == answers
    hits = engine.metric("vllm:prefix_cache_hits")
    assert engine.greedy(second, 24) == follow_ups
    assert engine.metric("vllm:prefix_cache_hits") > hits + len(prefix)
    assert acceptance.off_first_branch > 0


def test_chunked_prefill_beside_trees(model_path, prompts, check, acceptance):
    """A long prompt is read in chunks while short requests already decode on trees."""
    long_and_short = prompts(3, shortest=150, longest=190) + prompts(5, longest=9)
    check(
        model_path("llama"),
        long_and_short,
        max_num_batched_tokens=64,
        max_tokens=30,
    )
    assert acceptance.off_first_branch > 0


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_preemption(async_scheduling, model_path, prompts, check, acceptance):
    engine = check(
        model_path("llama"),
        prompts(6, shortest=20, longest=40),
        max_tokens=70,
        block_size=32,
        num_gpu_blocks_override=13,
        async_scheduling=async_scheduling,
    )
    assert engine.metric("vllm:num_preemptions") > 0
    assert acceptance.off_first_branch > 0


def test_requests_that_end_at_max_model_len(model_path, prompts, check, acceptance):
    check(
        model_path("llama"),
        prompts(4, shortest=40, longest=60),
        max_tokens=200,
        max_model_len=96,
        nodes=16,
        params={"ignore_eos": True},
    )
    assert acceptance.off_first_branch > 0


def test_stop_tokens_inside_an_accepted_path(model_path, prompts, start, acceptance):
    batch = prompts()
    free = start(model_path("llama")).greedy(batch, 40)
    stops = sorted({output[len(output) // 2] for output in free})
    plain = start(model_path("llama")).greedy(batch, 40, stop_token_ids=stops)
    assert any(len(cut) < len(whole) for cut, whole in zip(plain, free, strict=True))
    engine = start(model_path("llama"), truths=truths_of(batch, free))
    assert engine.greedy(batch, 40, stop_token_ids=stops) == plain
    # Paths ran past the stop: what came after it was accepted, then cut.
    emitted = sum(acceptance.lengths) + len(acceptance.lengths)
    assert emitted > sum(map(len, plain)) - len(plain)


def test_several_choices_of_one_prompt(model_path, prompts, start, acceptance):
    batch = prompts(3)
    params = SamplingParams(
        n=3, temperature=0.9, seed=5, max_tokens=20, detokenize=False
    )
    plain = start(model_path("llama")).generate(batch, params)
    assert len({tuple(choice) for choice in plain[0]}) > 1
    truths = [
        prompt + choice
        for prompt, choices in zip(batch, plain, strict=True)
        for choice in choices
    ]
    engine = start(model_path("llama"), truths=truths)
    assert engine.generate(batch, params) == plain
    assert acceptance.off_first_branch > 0


def test_aborting_a_request_leaves_the_others_alone(
    model_path, prompts, start, acceptance
):
    batch = prompts(5)
    plain = start(model_path("llama")).greedy(batch, 40)
    engine = start(model_path("llama"), truths=truths_of(batch, plain))
    core = engine.llm.llm_engine
    params = SamplingParams(max_tokens=40, temperature=0.0, detokenize=False)
    for index, prompt in enumerate(batch):
        core.add_request(str(index), {"prompt_token_ids": prompt}, params)
    finished = {}
    steps = 0
    while core.has_unfinished_requests():
        steps += 1
        if steps == 4:
            core.abort_request(["1", "3"])
        if steps == 6:  # newcomers take the freed slots
            core.add_request("5", {"prompt_token_ids": batch[1]}, params)
        for output in core.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
    kept = {key: value for key, value in finished.items() if key in "0245"}
    expected = [plain[0], plain[2], plain[4], plain[1]]
    assert [kept[key] for key in "0245"] == expected
    assert acceptance.off_first_branch > 0


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_slot_forgets_the_tree_of_its_last_request(
    async_scheduling, model_path, start, monkeypatch
):
    """A new one-token request is scheduled with padding for drafts it does not have.

    The slot still holds its predecessor's tree, which here would fit exactly.
    """
    options = {"max_num_seqs": 2, "async_scheduling": async_scheduling}
    # vLLM pads newcomers only beside a running request.
    batch = [[9, 8, 7], *[[5]] * 4]
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, detokenize=False)
        for length in (60, 12, 12, 12, 12)
    ]
    plain = start(model_path("llama"), **options).generate(batch, params)
    beginning = plain[1][0]
    engine = start(model_path("llama"), truths=[], **options)
    monkeypatch.setattr(
        engine.proposers[0],
        "_plant",
        lambda _: [(node - 1, beginning[node], -0.1) for node in range(8)],
    )
    assert engine.generate(batch, params) == plain


def test_block_sizes(model_path, prompts, check, acceptance):
    for block_size in (32, 64):
        check(model_path("llama"), prompts(3), block_size=block_size)
    assert acceptance.off_first_branch > 0


def test_the_adversary_hides_the_truth_off_the_first_branch():
    """The harness itself: a planted tree holds the truth, and not only in front."""
    proposer = PlantedProposer([[1, 2, 3, 4, 5, 6]], vocab_size=97, max_nodes=16)
    trees = [proposer._plant([3, 4, 5, 6]) for _ in range(200)]
    depth_first = [tree for tree in trees if tree[0][1] == 3]
    assert 0 < len(depth_first) < len(trees)
    assert proposer.num_planted > 100


def test_paths_may_end_anywhere(model_path, prompts, start, plain_greedy, acceptance):
    """A grammar may rule out nodes after the walk: the rest is decoded later."""
    batch = prompts(4)
    plain = plain_greedy(model_path("llama"), batch)
    truths = [prompt + output for prompt, output in zip(batch, plain, strict=True)]
    engine = start(model_path("llama"), truths=truths)
    sampler, rng = engine.runner.rejection_sampler, random.Random(0)
    num_cut, verify = 0, sampler._verify

    def with_invalid(logits, input_batch, invalid_drafts):
        nonlocal num_cut
        invalid = torch.tensor([rng.random() < 0.3 for _ in range(len(logits))])
        invalid[input_batch.cu_num_logits[:-1].long()] = False  # roots
        num_cut += int(invalid.sum())
        return verify(logits, input_batch, invalid)

    sampler._verify = with_invalid
    assert engine.greedy(batch) == plain
    assert num_cut > 5 and sum(acceptance.lengths) > 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's host does not know")
def test_unlikely_nodes_are_not_verified(model_path, prompts, start, plain_greedy):
    path, batch, drafted = model_path("llama"), prompts(4), []
    plain = plain_greedy(path, batch)
    for min_probability in (0.0, 0.3, 1.0):
        tree = {"proposers": [{"type": "suffix"}], "min_probability": min_probability}
        engine = start(path, tree=tree)
        for _ in range(2):  # the second time, what was said is remembered
            assert engine.greedy(batch) == plain
        drafted.append(engine.metric("vllm:spec_decode_num_draft_tokens"))
        accepted = engine.metric("vllm:spec_decode_num_accepted_tokens")
        assert (accepted > 0) == (min_probability < 1)
    assert drafted[0] > drafted[1] > drafted[2] == 0
