"""Greedy output with draft models is, token for token, that of no speculation.

Drafts are the target with noise on its weights, so that they are often right and often
wrong. ``exactness`` compares what they say inside the engine with transformers.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from vllm import SamplingParams

from vllm_treespec.config import ConfigError
from vllm_treespec.integration.draft_model import DraftModel

ROOT = Path(__file__).parents[2]
MIXES = ["one draft", "two drafts", "draft and suffix"]
# Of the target's weights. Some models shrug it off.
NOISE = {"gemma2": 0.15}
# Every mix under one of the schedulers, both schedulers, where that matters.
SCHEDULED = [("one draft", False), ("two drafts", True), ("draft and suffix", True)]


@pytest.fixture
def proposers(draft_path):
    """The ``tree.proposers`` of a mix."""

    def proposers(mix, architecture="llama", **options):
        options = {"depth": 4, "width": 3, "top_k": 3, **options}
        drafts = [
            {
                "type": "draft_model",
                "model": draft_path(architecture, seed, NOISE.get(architecture, 0.05)),
                **options,
            }
            for seed in range(2)
        ]
        return {
            "one draft": drafts[:1],
            "two drafts": drafts,
            "draft and suffix": [drafts[0], {"type": "suffix", "depth": 8}],
        }[mix]

    return proposers


@pytest.fixture
def check(start, plain_greedy, proposers, acceptance):
    """Run prompts plainly, then with draft models and the same engine options."""

    def check(
        model,
        prompts,
        *,
        mix="one draft",
        architecture="llama",
        max_tokens=24,
        nodes=8,
        kernels="auto",
        draft=None,
        params=None,
        dismissed=False,
        **options,
    ):
        sampling = params or {}
        plain = plain_greedy(model, prompts, max_tokens, params, **options)
        engine = start(
            model,
            tree={
                "proposers": proposers(mix, architecture, **(draft or {})),
                "kernels": kernels,
                "adaptive": False,
            },
            num_speculative_tokens=nodes,
            **options,
        )
        assert engine.greedy(prompts, max_tokens, **sampling) == plain
        assert sum(acceptance.lengths) > 0
        # A check inside a draft that fails would only dismiss it.
        assert dismissed or engine.runner.speculator.drafts.models
        return engine

    return check


@pytest.fixture
def exactness(monkeypatch):
    """Compares what draft models say in the engine with transformers, from scratch."""
    models = {}
    checked = []

    def oracle(draft, token_ids):
        path = draft.config.model
        if path not in models:
            # Other implementations leave Gemma's soft caps out.
            models[path] = transformers.AutoModelForCausalLM.from_pretrained(
                path, attn_implementation="eager"
            )
        with torch.no_grad():
            return models[path](torch.tensor([token_ids])).logits[0]

    original = DraftModel.propose

    def propose(draft, num_reqs, **options):
        states, out = draft._req_states, draft._out
        # A random request and path of each step, or all of it would take minutes.
        row = random.Random(len(checked)).randrange(num_reqs)
        offered = original(draft, num_reqs, **options)
        count = int(out.num_candidates[row])
        if not draft._active[row] or count == 0:
            return offered
        end, slot = int(draft._ends[row]), int(draft._slots[row])
        history = states.all_token_ids.gpu[slot, :end].tolist()
        logits = draft._logits(draft._newest_hidden[: row + 1])[row]
        torch.testing.assert_close(
            logits, oracle(draft, history)[-1], rtol=1e-3, atol=1e-3
        )
        parents, token_ids = out.parents[row].tolist(), out.token_ids[row].tolist()
        path = [random.Random(len(checked)).randrange(count)]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        drafted = [token_ids[node] for node in path]
        temperature = draft._temperatures[row]
        logits = oracle(draft, history + drafted)[end - 1 : -1]
        log_probs = (logits / temperature).log_softmax(-1)
        score = log_probs[range(len(drafted)), drafted].sum()
        torch.testing.assert_close(
            out.scores[row, path[-1]], score, rtol=1e-3, atol=1e-3
        )
        checked.append(len(path))
        return offered

    monkeypatch.setattr(DraftModel, "propose", propose)
    return checked


@pytest.mark.usefixtures("fp8_caches")
def test_quantized_caches(model_path, prompts, check, acceptance):
    check(model_path("llama"), prompts(3), max_tokens=12, kv_cache_dtype="fp8")
    assert acceptance.off_first_branch > 0


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "mistral", "gemma2", "mixtral"]
)
def test_every_architecture_drafts_and_keeps_its_tokens(
    architecture, model_path, prompts, check, acceptance, exactness
):
    check(
        model_path(architecture),
        prompts(4),
        architecture=architecture,
        max_tokens=24,
        nodes=10,
    )
    assert max(acceptance.lengths) > 2
    # This draft's likeliest path is always right; planted trees test its branches.
    assert acceptance.off_first_branch > 0 or architecture == "gemma2"
    assert max(exactness) > 2


@pytest.mark.parametrize("mix", MIXES)
def test_a_single_request(mix, model_path, prompts, check, acceptance):
    check(model_path("llama"), prompts(1), mix=mix, max_tokens=60)
    assert acceptance.off_first_branch > 0


@pytest.mark.parametrize("mix", ["two drafts"])
def test_interpreted_triton_kernels(mix, model_path, prompts, check):
    check(
        model_path("llama"),
        prompts(2, longest=20),
        mix=mix,
        max_tokens=8,
        kernels="triton",
        draft={"depth": 3, "width": 2, "top_k": 2},
    )


@pytest.mark.parametrize("nodes", [1, 70])
def test_any_number_of_nodes(nodes, model_path, prompts, check):
    wide = {"depth": 4, "width": 12, "top_k": 6}
    check(model_path("llama"), prompts(3), nodes=nodes, mix="two drafts", draft=wide)


@pytest.mark.parametrize(
    "draft",
    [
        {"shape": "static", "branching": [3, 2, 1]},
        {"shape": "sequoia", "acceptance": [0.6, 0.2, 0.1], "depth": 5},
        {"depth": 1},
        {"width": 1, "top_k": 1},
    ],
    ids=["static", "sequoia", "one level", "a chain"],
)
def test_every_shape_keeps_its_tokens(
    draft, model_path, prompts, check, acceptance, exactness
):
    check(model_path("llama"), prompts(4), draft=draft, nodes=16)
    depth = 3 if "branching" in draft else draft.get("depth", 4)
    assert min(depth, 3) <= max(acceptance.lengths) <= depth
    assert exactness


@pytest.mark.parametrize(("mix", "async_scheduling"), SCHEDULED)
def test_chunked_prefill_beside_trees(
    async_scheduling, mix, model_path, prompts, check, acceptance, exactness
):
    """A long prompt is read in chunks while short requests already decode on trees."""
    long_and_short = prompts(2, shortest=150, longest=190) + prompts(4, longest=9)
    check(
        model_path("llama"),
        long_and_short,
        mix=mix,
        max_num_batched_tokens=64,
        max_tokens=32,
        async_scheduling=async_scheduling,
    )
    assert acceptance.off_first_branch > 0
    assert len(exactness) > 10


@pytest.mark.parametrize(("mix", "async_scheduling"), SCHEDULED)
def test_preemption(
    async_scheduling, mix, model_path, prompts, check, acceptance, exactness
):
    engine = check(
        model_path("llama"),
        prompts(6, shortest=20, longest=40),
        mix=mix,
        max_tokens=48,
        block_size=32,
        num_gpu_blocks_override=14,
        async_scheduling=async_scheduling,
    )
    assert engine.metric("vllm:num_preemptions") > 0
    assert acceptance.off_first_branch > 0
    assert len(exactness) > 10


@pytest.mark.parametrize(("mix", "async_scheduling"), SCHEDULED)
def test_shared_prefixes_are_cached_for_the_draft_as_well(
    async_scheduling, mix, model_path, prompts, start, proposers, acceptance, exactness
):
    prefix = prompts(1, shortest=70, longest=70, seed=7)[0]
    first = [prefix + tail for tail in prompts(4, shortest=1, longest=9)]
    options = {
        "enable_prefix_caching": True,
        "block_size": 32,
        "async_scheduling": async_scheduling,
    }
    plain = start(model_path("llama"), **options)
    answers = plain.greedy(first, 48)
    # The next turn repeats the answer, whose KV both models wrote from trees.
    second = [p + a + [5, 6] for p, a in zip(first, answers, strict=True)]
    follow_ups = plain.greedy(second, 24)

    engine = start(
        model_path("llama"),
        tree={"proposers": proposers(mix), "adaptive": False},
        **options,
    )
    assert engine.greedy(first, 48) == answers
    hits = engine.metric("vllm:prefix_cache_hits")
    assert engine.greedy(second, 24) == follow_ups
    assert engine.metric("vllm:prefix_cache_hits") > hits + len(prefix)
    assert acceptance.off_first_branch > 0
    assert len(exactness) > 10


@pytest.mark.parametrize("mix", ["two drafts"])
def test_requests_that_end_at_max_model_len(mix, model_path, prompts, check, exactness):
    check(
        model_path("llama"),
        prompts(4, shortest=40, longest=60),
        mix=mix,
        max_tokens=200,
        max_model_len=96,
        nodes=16,
        params={"ignore_eos": True},
    )
    assert len(exactness) > 10


def test_a_draft_falls_silent_past_its_own_limit(
    model_path, prompts, check, acceptance, exactness, monkeypatch
):
    """The target's limit stays, the output is whole, and past the draft's limit nothing
    is drafted, until a shorter request comes."""
    furthest = []
    original = DraftModel.propose

    def propose(draft, num_reqs, **options):
        offered = original(draft, num_reqs, **options)
        drafted = draft._out.num_candidates[:num_reqs] > 0
        furthest.extend((draft._ends[:num_reqs][drafted]).tolist())
        return offered

    monkeypatch.setattr(DraftModel, "propose", propose)
    engine = check(
        model_path("llama"),
        prompts(2, shortest=50, longest=60) + prompts(2, shortest=3, longest=9),
        max_tokens=60,
        draft={"max_model_len": 80},
        params={"ignore_eos": True},
    )
    assert engine.llm.llm_engine.vllm_config.model_config.max_model_len == 256
    assert 70 < max(furthest) <= 80
    assert len(exactness) > 5


@pytest.mark.parametrize("mix", ["draft and suffix"])
def test_stop_tokens_inside_an_accepted_path(
    mix, model_path, prompts, start, proposers
):
    batch = prompts()
    free = start(model_path("llama")).greedy(batch, 40)
    stops = sorted({output[len(output) // 2] for output in free})
    plain = start(model_path("llama")).greedy(batch, 40, stop_token_ids=stops)
    engine = start(
        model_path("llama"), tree={"proposers": proposers(mix), "adaptive": False}
    )
    assert engine.greedy(batch, 40, stop_token_ids=stops) == plain


@pytest.mark.parametrize("mix", ["two drafts"])
def test_seeded_sampling_keeps_its_tokens(
    mix, model_path, prompts, start, proposers, acceptance
):
    batch = prompts(3)
    params = SamplingParams(
        n=2, temperature=0.8, top_p=0.95, seed=5, max_tokens=10, detokenize=False
    )
    plain = start(model_path("llama")).generate(batch, params)
    engine = start(
        model_path("llama"), tree={"proposers": proposers(mix), "adaptive": False}
    )
    assert engine.generate(batch, params) == plain
    assert sum(acceptance.lengths) > 0


def test_more_requests_than_the_batch_holds(model_path, prompts, check, exactness):
    check(model_path("llama"), prompts(9), max_num_seqs=3, max_tokens=16)
    assert exactness


@pytest.mark.parametrize(("mix", "async_scheduling"), SCHEDULED)
def test_steps_without_drafting_leave_the_cache_exact(
    async_scheduling, mix, model_path, prompts, check, exactness, monkeypatch
):
    """Each proposer rests at random; its draft must have kept up all the same."""
    from vllm_treespec.integration.worth import Worth

    rng = random.Random(0)
    monkeypatch.setattr(
        Worth,
        "drafting",
        property(lambda self: [rng.random() < 0.5 for _ in self._roster.drafting]),
    )
    check(
        model_path("llama"),
        prompts(4),
        mix=mix,
        max_tokens=32,
        async_scheduling=async_scheduling,
    )
    assert len(exactness) > 5


def test_a_draft_that_raises_is_dismissed_and_requests_go_on(
    model_path, prompts, check, monkeypatch
):
    calls = []
    original = DraftModel.propose

    def propose(draft, num_reqs, **options):
        calls.append(num_reqs)
        if len(calls) == 5:
            raise RuntimeError("a broken draft")
        return original(draft, num_reqs, **options)

    monkeypatch.setattr(DraftModel, "propose", propose)
    engine = check(model_path("llama"), prompts(), max_tokens=20, dismissed=True)
    assert len(calls) == 5
    assert engine.metric("vllm:treespec_proposer_faults") == 1


def test_a_draft_that_does_not_pay_rests(
    model_path, draft_path, prompts, start, monkeypatch
):
    """It never agrees with the target here, so its time is wasted."""
    from vllm_treespec.integration import worth

    monkeypatch.setattr(worth, "WINDOW", 8)
    grown = []
    original = DraftModel.propose

    def propose(draft, num_reqs, **options):
        grown.append(draft)
        return original(draft, num_reqs, **options)

    monkeypatch.setattr(DraftModel, "propose", propose)
    batch = prompts(1)
    plain = start(model_path("llama")).greedy(batch, 100)
    useless = {"type": "draft_model", "model": draft_path("llama", 5, noise=3.0)}
    engine = start(model_path("llama"), tree={"proposers": [useless]})
    assert engine.greedy(batch, 100) == plain
    assert len(grown) < 60


def test_a_draft_of_another_type_and_precision(model_path, prompts, start, draft_path):
    batch = prompts(3)
    plain = start(model_path("llama")).greedy(batch)
    draft = {"type": "draft_model", "model": draft_path("qwen3"), "dtype": "bfloat16"}
    engine = start(model_path("llama"), tree={"proposers": [{**draft, "width": 2}]})
    assert engine.greedy(batch) == plain


def test_the_cache_has_room_for_what_drafts_write(model_path, draft_path, start):
    draft = {
        "type": "draft_model",
        "model": draft_path("llama"),
        "depth": 4,
        "width": 3,
    }
    engine = start(model_path("llama"), tree={"proposers": [draft]})
    # The newest token, and three levels of three nodes whose children are drawn.
    assert engine.scheduler.num_lookahead_tokens == 1 + 3 * 3


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"width": 200}, "max_num_batched_tokens >="),
        ({"depth": 64, "width": 8}, "must be fewer than the 256 positions"),
        ({"max_model_len": 4096}, "max_model_len"),
        ({"quantization": "nonsense"}, "nonsense"),
    ],
)
def test_a_draft_that_cannot_run_ends_start_up(
    draft, message, model_path, draft_path, start
):
    proposer = {"type": "draft_model", "model": draft_path("llama"), **draft}
    with pytest.raises(ConfigError, match=message):
        start(
            model_path("llama"),
            tree={"proposers": [proposer]},
            max_num_batched_tokens=512,
        )


def test_a_draft_with_another_vocabulary_ends_start_up(model_path, tmp_path, start):
    from tests.engine.conftest import SHAPE

    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": 98})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    proposer = {"type": "draft_model", "model": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"98 tokens in its vocabulary.*has 97"):
        start(model_path("llama"), tree={"proposers": [proposer]})


@pytest.mark.parametrize("num_rows", [2040, 2056])
def test_a_vocabulary_padded_to_another_size_is_the_same(
    num_rows, prompts, start, tmp_path
):
    from shutil import copytree

    draft = copytree(ROOT / "models/python-stdlib/draft", tmp_path / "draft")
    model = transformers.AutoModelForCausalLM.from_pretrained(draft)
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    model.save_pretrained(draft)
    target = str(ROOT / "models/python-stdlib/target")
    batch = [[*range(num, 2047, 97)] for num in range(1900, 1903)]
    plain = start(target).greedy(batch)
    proposer = {"type": "draft_model", "model": str(draft)}
    engine = start(target, tree={"proposers": [proposer]})
    assert engine.greedy(batch) == plain
    assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0


def test_missing_weights_end_start_up(model_path, draft_path, tmp_path, start):
    from shutil import copytree

    copytree(draft_path("llama"), tmp_path / "draft")
    (tmp_path / "draft" / "model.safetensors").unlink()
    proposer = {"type": "draft_model", "model": str(tmp_path / "draft")}
    with pytest.raises(ConfigError, match=r"draft_model .*weights"):
        start(model_path("llama"), tree={"proposers": [proposer]})
