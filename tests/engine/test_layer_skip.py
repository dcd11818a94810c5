"""The target drafts for itself with layers skipped: greedy output must not notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_treespec.config import ConfigError, SkipSet
from vllm_treespec.integration.layer_skip import LayerSkip
from vllm_treespec.integration.skipped_layers import (
    SkippedPart,
    default_skip_set,
)

SETS = {
    "prefix": {"attention": [2, 3], "mlp": [2, 3]},
    "not a prefix": {"attention": [1, 2], "mlp": [1, 2]},
    "attention only": {"attention": [1, 3]},
    "mlp only": {"mlp": [1, 2, 3]},
    "mixed": {"attention": [1, 3], "mlp": [0, 1]},
}
SHAPE = {"depth": 3, "width": 3, "top_k": 3}


def layer_skip(skipped="not a prefix", **options):
    return {"type": "layer_skip", "skip": SETS[skipped], **SHAPE, **options}


@pytest.fixture
def untouched(monkeypatch):
    """Compares all KV around each step's drafting, bit by bit: nothing changes but
    places of the newest tokens and behind them. Counts the places that do."""
    changes, strays, before = [], [], {}
    catch_up, propose = LayerSkip.catch_up, LayerSkip.propose

    def caches(draft):
        """Layers of several KV cache groups may share one."""
        layers = draft._vllm_config.compilation_config.static_forward_context.values()
        caches = [each.kv_cache for each in layers if hasattr(each, "kv_cache")]
        return {each.data_ptr(): each for each in caches}

    def spied_catch_up(draft, *args):
        before.update({key: each.clone() for key, each in caches(draft).items()})
        catch_up(draft, *args)

    def spied_propose(draft, num_reqs, **options):
        offered = propose(draft, num_reqs, **options)
        _, block_tables = draft._cache
        stray = {  # [blocks, block_size] each
            key: (before[key] != each).any(3).any(1)
            for key, each in caches(draft).items()
        }
        changes.append(sum(int(each.sum()) for each in stray.values()))
        for tables, block_size in zip(
            block_tables.input_block_tables, block_tables.block_sizes, strict=True
        ):
            for row in range(num_reqs):
                if draft._active[row]:
                    first = int(draft._ends[row]) - 1
                    last = min(first + draft.grower.max_num_nodes, draft.max_len)
                    places = torch.arange(first, last)
                    blocks = tables[row, places // block_size].long()
                    for each in stray.values():
                        each[blocks, places % block_size] = False
        # Not asserted here: a proposer that raises is only dismissed.
        strays.append(sum(int(each.sum()) for each in stray.values()))
        return offered

    monkeypatch.setattr(LayerSkip, "catch_up", spied_catch_up)
    monkeypatch.setattr(LayerSkip, "propose", spied_propose)
    yield changes
    assert sum(changes) > 0
    assert sum(strays) == 0


@pytest.fixture
def check(start, plain_greedy, acceptance):
    """Run prompts plainly, then with drafts, by the same engine options."""

    def check(model, batch, proposers, *, max_tokens=16, nodes=8, tree=None, **options):
        plain = plain_greedy(model, batch, max_tokens, **options)
        engine = start(
            model,
            tree={"proposers": proposers, "adaptive": False, **(tree or {})},
            num_speculative_tokens=nodes,
            **options,
        )
        assert engine.greedy(batch, max_tokens) == plain
        assert sum(acceptance.lengths) > 0
        assert len(engine.runner.speculator.drafts.models) > 0  # none was dismissed
        return engine

    return check


@pytest.mark.parametrize(
    ("skipped", "architecture", "async_scheduling"),
    [
        ("prefix", "granite", False),
        ("not a prefix", "qwen3", True),
        ("attention only", "gemma2", False),
        ("mlp only", "mixtral", True),
        ("mixed", "mistral", False),
    ],
)
def test_every_kind_of_skip_set_keeps_the_tokens_and_the_verified_kv(
    skipped, architecture, async_scheduling, deep_model_path, prompts, check, untouched
):
    check(
        deep_model_path(architecture),
        prompts(3),
        [layer_skip(skipped)],
        async_scheduling=async_scheduling,
    )


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_chunked_prefill_preemption_and_prefix_caching(
    async_scheduling, deep_model_path, prompts, check, untouched
):
    engine = check(
        deep_model_path("llama"),
        prompts(4, shortest=20, longest=40) * 2,
        [layer_skip(depth=2)],
        max_tokens=40,
        nodes=4,
        async_scheduling=async_scheduling,
        block_size=32,
        num_gpu_blocks_override=9,
        max_num_seqs=6,
        max_num_batched_tokens=48,
        enable_prefix_caching=True,
    )
    assert engine.metric("vllm:num_preemptions") > 0


def test_together_with_a_draft_model_and_suffixes(
    deep_model_path, draft_path, prompts, check
):
    check(
        deep_model_path("llama"),
        prompts(3),
        [
            {"type": "suffix"},
            layer_skip(),
            {"type": "draft_model", "model": draft_path("llama"), **SHAPE},
        ],
        nodes=10,
    )


def test_up_to_the_last_position(deep_model_path, prompts, check):
    check(
        deep_model_path("llama"),
        prompts(2, shortest=40, longest=50),
        [layer_skip()],
        max_tokens=64,
        max_model_len=64,
    )


def test_the_draft_says_what_the_skipped_target_says_of_the_targets_own_kv(
    deep_model_path, prompts, start, monkeypatch
):
    path, skip = deep_model_path("llama"), SkipSet(attention=(1, 2), mlp=(0, 2))
    target = transformers.AutoModelForCausalLM.from_pretrained(path)
    skipped = transformers.AutoModelForCausalLM.from_pretrained(path)
    for index in skip.attention:
        # Transformers unpack the weights of the attention, too.
        layer, zeros = skipped.model.layers[index], SkippedPart()
        layer.self_attn.forward = lambda *a, zeros=zeros, **k: (zeros(*a, **k), None)
    for index in skip.mlp:
        skipped.model.layers[index].mlp = SkippedPart()
    checked, original = [], LayerSkip.propose

    def propose(draft, num_reqs, **options):
        offered = original(draft, num_reqs, **options)
        if not draft._active[0]:
            return offered
        end, slot = int(draft._ends[0]), int(draft._slots[0])
        history = draft._req_states.all_token_ids.gpu[slot, :end].tolist()
        # The longest path, by way of the tree's own parents.
        count = int(draft._out.num_candidates[0])
        parents = draft._out.parents[0, :count].tolist()
        paths = {-1: ()}
        for place, parent in enumerate(parents):
            paths[place] = (*paths[parent], place)
        path = max(paths.values(), key=len)
        drafted = draft._out.token_ids[0, list(path)].tolist()
        with torch.no_grad():
            cache = target(torch.tensor([history[:-1]])).past_key_values
            logits = skipped(
                torch.tensor([[history[-1], *drafted[:-1]]]),
                past_key_values=cache,
                position_ids=torch.arange(end - 1, end - 1 + len(drafted))[None],
            ).logits[0]
        log_probs = (logits / draft._temperatures[0]).log_softmax(-1)
        score = log_probs[range(len(drafted)), drafted].sum()
        found = draft._out.scores[0, path[-1]]
        checked.append(torch.allclose(found, score, rtol=1e-3, atol=1e-3))
        return offered

    monkeypatch.setattr(LayerSkip, "propose", propose)
    sets = {"attention": list(skip.attention), "mlp": list(skip.mlp)}
    proposer = {"type": "layer_skip", "skip": sets, **SHAPE, "early_stop": False}
    engine = start(path, tree={"proposers": [proposer], "adaptive": False})
    engine.greedy(prompts(2), 12)
    assert len(checked) > 4
    assert all(checked)


def test_no_weights_and_no_kv_of_its_own(deep_model_path, start):
    plain = start(deep_model_path("llama"))
    blocks = plain.runner.kv_cache_config.num_blocks
    layers = [set(g.layer_names) for g in plain.runner.kv_cache_config.kv_cache_groups]
    weights = sum(each.numel() for each in plain.runner.model.parameters())
    engine = start(deep_model_path("llama"), tree={"proposers": [layer_skip()]})
    config = engine.runner.kv_cache_config
    assert [set(group.layer_names) for group in config.kv_cache_groups] == layers
    assert config.num_blocks == blocks
    (draft,) = engine.runner.speculator.drafts.models.values()
    own = {each.data_ptr() for each in engine.runner.model.parameters()}
    assert {each.data_ptr() for each in draft.model.parameters()} < own
    assert sum(each.numel() for each in engine.runner.model.parameters()) == weights


def test_sampled_requests_draw_from_the_skipped_target(
    deep_model_path, prompts, start, acceptance
):
    engine = start(deep_model_path("llama"), tree={"proposers": [layer_skip()]})
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    assert all(len(out[0]) == 12 for out in engine.generate(prompts(3), params))
    assert sum(acceptance.lengths) > 0


def test_an_unsure_draft_stops_early(deep_model_path, prompts, start, monkeypatch):
    levels, original = [], LayerSkip.propose

    def propose(draft, num_reqs, **options):
        offered = original(draft, num_reqs, **options)
        levels.append(draft.grower.num_candidates_at.index(offered))
        return offered

    monkeypatch.setattr(LayerSkip, "propose", propose)
    batch = prompts(2)
    for options in ({}, {"early_stop": True}):
        tree = {"proposers": [layer_skip("mlp only", depth=5, **options)]}
        start(deep_model_path("llama"), tree=tree).greedy(batch, 12)
        if options:
            assert min(levels) < 5
        assert max(levels) <= 5
        if not options:
            assert set(levels) == {5}
        levels.clear()


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ({"attention": [4]}, "layer 4 is skipped, the model has layers 0 to 3"),
        ({"attention": [0, 1, 2, 3], "mlp": [0, 1, 2, 3]}, "no layer is left"),
        ({"mlp": [1], "num_layers": 32}, "num_layers=32: the model has 4"),
        ({"mlp": [1], "fingerprint": "0" * 16, "model": "other"}, "tuned for another"),
    ],
)
def test_a_set_of_another_model_is_refused_at_start_up(
    skip, message, deep_model_path, start
):
    with pytest.raises(ConfigError, match=message):
        start(
            deep_model_path("llama"),
            tree={"proposers": [{"type": "layer_skip", "skip": skip}]},
        )


def test_adapters_are_refused(deep_model_path, start):
    with pytest.raises(ConfigError, match="switch LoRA off"):
        start(
            deep_model_path("llama"),
            tree={"proposers": [layer_skip()]},
            enable_lora=True,
        )


def test_default_sets_leave_the_outer_layers():
    assert default_skip_set(12).attention == (1, 3, 5, 7, 9)
    assert default_skip_set(2).attention == ()


@pytest.fixture
def quantized_path(deep_model_path, tmp_path):
    """The deep Llama with int8 weights per channel, as llm-compressor writes them."""
    path = Path(deep_model_path("llama"))
    config = json.loads((path / "config.json").read_text())
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**kind, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    **kind,
                    # vLLM's kernel for symmetric ones on CPUs with AMX takes no float32.
                    "symmetric": False,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {}
    for name, weight in load_file(path / "model.safetensors").items():
        weights[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name] = (weight / scale).round().to(torch.int8)
            weights[f"{name}_scale"] = scale
    save_file(weights, tmp_path / "model.safetensors")
    return str(tmp_path)


def test_a_quantized_target_drafts_with_its_quantized_layers(
    quantized_path, prompts, check
):
    engine = check(quantized_path, prompts(2), [layer_skip()], max_tokens=12)
    (draft,) = engine.runner.speculator.drafts.models.values()
    for index in (0, 3):
        own = engine.runner.model.model.layers[index]
        assert draft.model.model.layers[index] is own
        assert own.mlp.down_proj.quant_method is not None


def test_what_is_left_to_a_compiler_runs_vllms_own_kernels_in_the_draft(
    deep_model_path, prompts, start, plain_greedy, monkeypatch
):
    """The draft is not compiled, and would run norms as a dozen operations each."""
    model, batch = deep_model_path("llama"), prompts(2)
    expected = plain_greedy(model, batch)
    monkeypatch.setattr(SiluAndMul, "enabled", classmethod(lambda _: False))
    engine = start(model, tree={"proposers": [layer_skip()]})
    (draft,) = engine.runner.speculator.drafts.models.values()

    def kernels(module):
        return {
            each._forward_method.__name__
            for each in module.modules()
            if isinstance(each, SiluAndMul)
        }

    assert kernels(engine.runner.model) == {"forward_native"}
    assert kernels(draft.model) == {"forward_cpu"}
    own = {id(each) for each in engine.runner.model.parameters()}
    assert {id(each) for each in draft.model.parameters()} <= own
    assert engine.greedy(batch) == expected
