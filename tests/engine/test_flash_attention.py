"""Prompts by FlashAttention beside trees by our kernel: the tokens stay the same."""

from __future__ import annotations

import pytest
import torch

from vllm_treespec.integration import speculator as speculator_module
from vllm_treespec.integration.attention import TreeForward
from vllm_treespec.integration.flash_attention import FlashAttention
from vllm_treespec.integration.model_state import TreeModelState
from vllm_treespec.testing.flash_attention import flash_attn_varlen_func
from vllm_treespec.testing.no_sync import NoSync


class Asked:
    """Puts a stand-in for FlashAttention into engines, and sees what it is asked."""

    def __init__(self, monkeypatch, function=flash_attn_varlen_func):
        self.batches = []  # query lengths of each layer whose tail was served
        self.before = []  # per step, requests before the tail; None: no tail
        asked = self

        def attend(**arguments):
            asked.batches.append(arguments["cu_seqlens_q"].diff().tolist())
            return function(**arguments)

        def find(vllm_config, device):
            return FlashAttention(
                attend,
                lambda heads: 3,
                dtype=torch.float32,
                block_size=16,
                device=device,
            )

        original = TreeModelState.prepare_attn

        def prepare(self, *args, **kwargs):
            metadata = original(self, *args, **kwargs)
            tail = self.speculator.flash.tail
            asked.before.append(None if tail is None else tail.reqs.start)
            return metadata

        monkeypatch.setattr(speculator_module, "find_flash_attention", find)
        monkeypatch.setattr(TreeModelState, "prepare_attn", prepare)

    def forget(self):
        self.batches.clear()
        self.before.clear()


# Prompts come in chunks, while others decode.
CHUNKS = {"max_num_batched_tokens": 48, "max_num_seqs": 3}


@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [
        ("llama", "torch"),
        ("gemma2", "torch"),
        ("granite-sinks", "torch"),
        ("llama", "triton"),
    ],
)
def test_prompts_beside_trees_keep_their_tokens(
    architecture,
    kernels,
    model_path,
    prompts,
    start,
    plain_greedy,
    monkeypatch,
):
    model, batch = model_path(architecture), prompts(5, longest=60)
    max_tokens = 20 if kernels == "torch" else 6
    plain = plain_greedy(model, batch, max_tokens, **CHUNKS)
    asked = Asked(monkeypatch)
    engine = start(
        model,
        truths=[p + o for p, o in zip(batch, plain, strict=True)],
        tree={"kernels": kernels},
        **CHUNKS,
    )
    asked.forget()
    assert engine.greedy(batch, max_tokens) == plain
    num_layers = engine.runner.model.config.num_hidden_layers
    # Every token of a prompt, once in each layer, and now and then a decoding request.
    assert sum(map(sum, asked.batches)) >= sum(map(len, batch)) * num_layers
    assert None in asked.before and 0 in asked.before and any(asked.before)
    assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0


def test_drafts_by_the_targets_own_layers_do_not_ask(
    deep_model_path, prompts, start, plain_greedy, monkeypatch
):
    model, batch = deep_model_path("llama"), prompts(4, longest=60)
    plain = plain_greedy(model, batch, **CHUNKS)
    asked = Asked(monkeypatch)
    drafting = {"type": "layer_skip", "skip": {"attention": [1, 2]}}
    engine = start(model, tree={"proposers": [drafting]}, **CHUNKS)
    asked.forget()
    assert engine.greedy(batch) == plain
    num_tails = sum(first is not None for first in asked.before)
    assert (
        len(asked.batches) == num_tails * engine.runner.model.config.num_hidden_layers
    )
    assert not engine.runner.speculator.drafts.faulty


def test_asking_does_not_wait_for_the_device(
    model_path, prompts, start, plain_greedy, monkeypatch
):
    model, batch = model_path("llama"), prompts(5, longest=60)
    plain = plain_greedy(model, batch, 20, **CHUNKS)
    watch, choose = NoSync(), speculator_module.choose_kernels
    asked = Asked(monkeypatch, watch.counted("flash", flash_attn_varlen_func))
    monkeypatch.setattr(
        speculator_module, "choose_kernels", lambda *args: watch.wrap(choose(*args))
    )
    calls = dict.fromkeys(("begin", "forward"), 0)
    for owner, method in ((FlashAttention, "begin"), (TreeForward, "forward")):
        original = getattr(owner, method)

        def watched(*args, original=original, method=method, **options):
            calls[method] += 1
            with watch:
                return original(*args, **options)

        monkeypatch.setattr(owner, method, watched)
    engine = start(
        model,
        truths=[p + o for p, o in zip(batch, plain, strict=True)],
        **CHUNKS,
    )
    asked.forget()
    assert engine.greedy(batch, 20) == plain
    assert min(calls.values()) > 4 and asked.batches and any(asked.before)
