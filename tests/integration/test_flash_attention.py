"""FlashAttention is asked only for layers in which it agrees with our own kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from vllm_treespec.integration.flash_attention import (
    FlashAttention,
    find_flash_attention,
)
from vllm_treespec.integration.flash_trial import Heads
from vllm_treespec.testing.flash_attention import flash_attn_varlen_func as right

CPU = torch.device("cpu")
PLAIN = Heads(
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    scale=0.2,
    sliding_window=None,
    soft_cap=None,
    has_sinks=False,
)
KINDS = {
    "plain": PLAIN,
    "window": replace(PLAIN, sliding_window=9),
    "soft cap": replace(PLAIN, soft_cap=2.0),
    "sinks": replace(PLAIN, has_sinks=True),
    "one head": replace(PLAIN, num_kv_heads=1, head_size=64),
}


def flash(attend, version=3):
    return FlashAttention(
        attend,
        lambda heads: version,
        dtype=torch.bfloat16,
        block_size=16,
        device=CPU,
    )


def wrong(changes, **arguments):
    return right(**{**arguments, **changes})


def refuse(**arguments):
    raise NotImplementedError("not in this build")


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_which_it_agrees_are_served(kind, version):
    assert flash(right, version).serves(KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("plain", {"softmax_scale": 0.5}),
        ("window", {"window_size": [-1, 0]}),
        ("window", {"window_size": [9, 0]}),
        ("soft cap", {"softcap": 0.0}),
        ("sinks", {"s_aux": None}),
    ],
)
def test_what_it_misreads_it_does_not_serve(kind, changes):
    attention = flash(partial(wrong, changes))
    assert not attention.serves(KINDS[kind])
    assert attention.tail is None


def test_what_it_does_not_know_it_does_not_serve():
    assert not flash(refuse).serves(PLAIN)
    assert not flash(right, version=None).serves(PLAIN)
    assert not flash(right, version=5).serves(PLAIN)


def test_a_kind_of_layer_is_tried_once():
    calls = []

    def count(**arguments):
        calls.append(arguments)
        return right(**arguments)

    attention = flash(count)
    assert attention.serves(PLAIN) and attention.serves(replace(PLAIN))
    assert len(calls) == 2  # in both layouts of the cache


def test_there_is_none_on_a_cpu():
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    assert find_flash_attention(config, CPU) is None
