"""Attention over trees on a CPU: gathers keys, and lets torch's own attention read them.

What a batch looks like is worked out once and kept for all layers, and query heads that
share keys are rows of one matrix product. Everything is computed in float32, so half
precision is rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_treespec.kernels.reference import tree_attention as twin

CHUNK = 256  # rows of a prompt at a time: what they may see is a matrix


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one request and the keys that any of them sees."""

    rows: slice
    blocks: torch.Tensor  # [num_keys] int64, where each key is stored
    places: torch.Tensor  # [num_keys] int64, in its block
    window: int  # tokens before a causal row that it sees, itself included
    # [num_rows * group, num_keys] f32, 0: seen, -inf: hidden; None: causal rows
    bias: torch.Tensor | None


def host_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache: torch.Tensor,  # as key_cache
    output: torch.Tensor,  # [num_tokens, num_heads, head_size], written in place
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    seq_lens: torch.Tensor,  # [num_reqs] int32
    block_table: torch.Tensor,  # [num_reqs, max_num_blocks] int32
    num_nodes: torch.Tensor,  # [>= num_reqs] int32
    depths: torch.Tensor,  # [>= num_reqs, max_num_nodes] int32
    masks: torch.Tensor,  # [>= num_reqs, max_num_nodes, words] int32
    *,
    max_query_len: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    plans: dict[Any, Any] | None = None,
    **options: Any,
) -> None:
    """As ``tree_attention``. Soft caps, sinks and quantized caches, which torch's kernel
    lacks, are left to the twin.

    Args:
        plans: filled by the first call and read by later ones, which must be about the
            same batch and trees; their keys, queries and windows may differ.
    """
    batch = (query_start_loc, seq_lens, block_table, num_nodes, depths, masks)
    if (
        soft_cap is not None
        or key_cache.element_size() == 1
        or options.get("sinks") is not None
    ):
        twin.tree_attention(
            query,
            key_cache,
            value_cache,
            output,
            *batch,
            max_query_len=max_query_len,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            **options,
        )
        return
    plans = {} if plans is None else plans
    group = query.shape[1] // key_cache.shape[1]
    shape = (sliding_window, key_cache.shape[2], group)
    if shape not in plans:
        plans[shape] = list(_parts(*batch, *shape))
    for part in plans[shape]:
        _attend(query, key_cache, value_cache, output, part, scale)


def _parts(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    num_nodes: torch.Tensor,
    depths: torch.Tensor,
    masks: torch.Tensor,
    sliding_window: int | None,
    block_size: int,
    group: int,
) -> Iterator[_Part]:
    starts, trees = query_start_loc.tolist(), num_nodes.tolist()
    for req, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[req], starts[req + 1]
        window = sliding_window or seq_len
        blocks = block_table[req].long()

        def part(
            rows: slice,
            keys: slice,
            bias: torch.Tensor | None = None,
            blocks: torch.Tensor = blocks,
            window: int = window,
        ) -> _Part:
            slots = torch.arange(keys.start, keys.stop)
            return _Part(
                rows, blocks[slots // block_size], slots % block_size, window, bias
            )

        if trees[req] > 1:
            tree = slice(0, trees[req])
            bias, first = _tree_bias(
                depths[req, tree], masks[req, tree], end - begin, seq_len, window
            )
            if end > begin:
                bias = bias.repeat_interleave(group, 0)
                yield part(slice(begin, end), slice(first, seq_len), bias)
            continue
        for row in range(begin, end, CHUNK):
            last = min(row + CHUNK, end)
            before = seq_len - (end - row)  # keys before the first of these rows
            first = max(0, before - window + 1)
            yield part(slice(row, last), slice(first, before + last - row))


def _tree_bias(
    depths: torch.Tensor,  # [num_nodes] int32
    masks: torch.Tensor,  # [num_nodes, words] int32
    query_len: int,
    seq_len: int,
    window: int,
) -> tuple[torch.Tensor, int]:
    """What rows see of the keys from the first that any of them sees, and that key."""
    visible = twin._visible(masks, query_len, seq_len)
    positions = twin._positions(depths, seq_len)
    visible &= positions[-query_len:, None] - positions < window
    # Blocks that left the window may hold anything, even NaN.
    first = int(visible.any(0).int().argmax())
    return _bias(visible[:, first:]), first


def _bias(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))


def _causal_bias(num_rows: int, num_keys: int, window: int) -> torch.Tensor:
    """The rows are those of the last keys."""
    keys = torch.arange(num_keys)
    distances = keys[-num_rows:, None] - keys
    return _bias((distances >= 0) & (distances < window))


def _attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    part: _Part,
    scale: float,
) -> None:
    num_rows = part.rows.stop - part.rows.start
    num_kv_heads, head_size = key_cache.shape[1], key_cache.shape[3]
    rows = query[part.rows].float().view(num_rows, num_kv_heads, -1, head_size)
    bias = part.bias
    if bias is None and num_rows > 1:
        bias = _causal_bias(num_rows, len(part.places), part.window)
        bias = bias.repeat_interleave(rows.shape[2], 0)
    attended = torch.nn.functional.scaled_dot_product_attention(
        rows.transpose(0, 1).flatten(1, 2)[None],
        key_cache[part.blocks, :, part.places].float().transpose(0, 1)[None],
        value_cache[part.blocks, :, part.places].float().transpose(0, 1)[None],
        attn_mask=bias,
        scale=scale,
    )
    by_head = attended.view(num_kv_heads, num_rows, -1, head_size)
    output[part.rows] = by_head.transpose(0, 1).flatten(1, 2).to(output.dtype)
