"""FlashAttention is asked only for layers in which it agrees with our own kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_treespec.integration.flash_attention import (
    FlashAttention,
    find_flash_attention,
)
from vllm_treespec.integration.flash_trial import Heads
from vllm_treespec.kernels.attention_plan import Region
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


LONG = Region(min_rows=8, max_rows=128, min_keys=1000)


def flash(attend, version=3, regions=()):
    return FlashAttention(
        attend,
        lambda heads: version,
        lambda head_size: list(regions),
        dtype=torch.bfloat16,
        block_size=16,
        max_num_reqs=1,  # fewer than it is tried on
        max_num_keys=2000,
        device=CPU,
    )


def wrong(changes, **arguments):
    return right(**{**arguments, **changes})


def refuse(**arguments):
    raise NotImplementedError("not in this build")


@pytest.mark.parametrize("regions", [(), (LONG,)])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_which_it_agrees_are_served(kind, regions):
    assert flash(right, regions=regions).serves(KINDS[kind])


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


def wrong_log_sums(**arguments):
    result = right(**arguments)
    if arguments["causal"]:
        return result
    return result[0], result[1] + 0.5


def test_contexts_that_it_misreads_it_does_not_take():
    assert flash(wrong_log_sums).serves(PLAIN)
    assert not flash(wrong_log_sums, regions=[LONG]).serves(PLAIN)


def test_contexts_are_taken_in_the_regions_of_the_table():
    attention = flash(right, regions=[LONG])
    assert attention.serves(PLAIN)
    known = np.array([999, 1500, 3000], np.int32)
    batch = SimpleNamespace(
        num_reqs=2,
        query_start_loc=torch.tensor([0, 4, 8]),
        query_start_loc_np=np.array([0, 4, 8]),
        cu_num_logits_np=np.array([0, 4, 8]),
        seq_lens=torch.tensor([999, 1500]),
        seq_lens_cpu_upper_bound=torch.from_numpy(known),
    )

    def takes(heads=PLAIN, max_query_len=4, **options):
        attention.begin(batch, **options)
        return attention.takes_context(heads, max_query_len)

    assert takes(is_graph=False)
    assert not takes(is_graph=True), "a graph is replayed for short contexts too"
    assert not takes(is_graph=False, max_query_len=3)
    assert not takes(is_graph=False, max_query_len=65)
    assert not takes(is_graph=False, heads=KINDS["window"])
    known[:2] = 999
    assert not takes(is_graph=False)
    attention = flash(right, regions=[LONG, LONG._replace(min_keys=0)])
    assert takes(is_graph=True)


def test_what_it_does_not_know_it_does_not_serve():
    assert not flash(refuse).serves(PLAIN)
    assert not flash(right, version=None).serves(PLAIN)
    assert not flash(right, version=4).serves(PLAIN)


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
