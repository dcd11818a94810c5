"""FlashAttention over the keys of earlier steps, ours over the rest: as trees get it."""

from collections.abc import Callable

import torch

from vllm_treespec.integration.flash_attention import (
    FlashAttention,
    vllm_flash_attention,
)
from vllm_treespec.integration.flash_trial import Heads
from vllm_treespec.kernels.tree_attention import tree_attention
from vllm_treespec.testing.flash_attention import flash_attn_varlen_func


def kind_of_layer(num_heads: int, num_kv_heads: int, head_size: int) -> Heads:
    """A layer that sees everything."""
    return Heads(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        scale=head_size**-0.5,
        sliding_window=None,
        soft_cap=None,
        has_sinks=False,
    )


def attend_apart(
    heads: Heads, batch: dict[str, torch.Tensor], block_size: int
) -> Callable[..., None]:
    """``tree_attention`` in three launches, for batches of these lengths. Without a GPU
    FlashAttention is a stand-in in torch."""
    query, seq_lens = batch["query"], batch["seq_lens"]
    sizes = {
        "dtype": query.dtype,
        "block_size": block_size,
        "max_num_reqs": len(seq_lens),
        "max_num_keys": int(seq_lens.max()),
        "device": query.device,
    }
    if query.is_cuda:
        flash = vllm_flash_attention(**sizes)
    else:
        flash = FlashAttention(
            flash_attn_varlen_func, lambda _: 3, lambda _: [], **sizes
        )
    flash.count_context(seq_lens, batch["query_start_loc"])
    attend: Callable[..., None] = flash.around(heads, tree_attention)
    return attend
