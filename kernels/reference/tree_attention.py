"""Attention over a tree, one request at a time."""

import torch

from vllm_treespec.kernels.attention_plan import SplitBuffers, TileSizes

WORD_BITS = 32


def tree_attention(
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
    sinks: torch.Tensor | None = None,  # [num_heads]
    key_scale: torch.Tensor | None = None,  # [1] or [] f32
    value_scale: torch.Tensor | None = None,
    split: SplitBuffers | None = None,
    tiles: TileSizes | None = None,
) -> None:
    starts = query_start_loc.tolist()
    trees = num_nodes.tolist()
    for req, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[req], starts[req + 1])
        query_len = rows.stop - rows.start
        if query_len == 0:
            continue
        tree = slice(0, max(trees[req], 1))  # no tree: a root alone
        positions = _positions(depths[req, tree], seq_len)
        visible = _visible(masks[req, tree], query_len, seq_len)
        if sliding_window is not None:
            distances = positions[-query_len:, None] - positions[None, :]
            visible &= distances < sliding_window
        # Blocks that left the window may hold anything, even NaN.
        keys = torch.arange(
            int(visible.any(0).int().argmax()), seq_len, device=query.device
        )
        output[rows] = _attend(
            query[rows],
            _gather(key_cache, block_table[req], keys, key_scale),
            _gather(value_cache, block_table[req], keys, value_scale),
            visible[:, keys],
            scale,
            soft_cap,
            sinks,
        )


def _positions(
    depths: torch.Tensor,  # [num_nodes] int32
    seq_len: int,
) -> torch.Tensor:  # [seq_len] int64
    positions = torch.arange(seq_len, device=depths.device)
    root = seq_len - depths.shape[0]
    positions[root + 1 :] = root + depths[1:]
    return positions


def _visible(
    masks: torch.Tensor,  # [num_nodes, words] int32
    query_len: int,
    seq_len: int,
) -> torch.Tensor:  # [query_len, seq_len] bool, row sees key
    num_nodes = masks.shape[0]
    slots = torch.arange(seq_len, device=masks.device)
    visible = slots <= slots[-query_len:, None]
    bits = torch.arange(WORD_BITS, dtype=torch.int32, device=masks.device)
    seen = (masks[:, :, None] >> bits & 1).flatten(1)[:, :num_nodes] == 1
    # The root is a causal row, whatever its mask.
    seen[0] = True
    num_tree_rows = min(query_len, num_nodes)  # earlier nodes are in the cache only
    visible[-num_tree_rows:, -num_nodes:] &= seen[-num_tree_rows:]
    return visible


def _gather(
    cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, head_size]
    blocks: torch.Tensor,  # [max_num_blocks] int32
    keys: torch.Tensor,  # [num_keys] int64
    scale: torch.Tensor | None,  # [1] or [] f32
) -> torch.Tensor:  # [num_keys, num_kv_heads, head_size] f32
    block_size = cache.shape[2]
    # Torch does not index floats of one byte.
    stored = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    rows = stored[blocks[keys // block_size].long(), :, keys % block_size]
    rows = rows.view(cache.dtype).float()
    return rows if scale is None else rows * scale


def _attend(
    query: torch.Tensor,  # [query_len, num_heads, head_size]
    keys: torch.Tensor,  # [num_keys, num_kv_heads, head_size] f32
    values: torch.Tensor,  # as keys
    visible: torch.Tensor,  # [query_len, num_keys] bool
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,  # [num_heads]
) -> torch.Tensor:  # [query_len, num_heads, head_size]
    num_keys, num_kv_heads, head_size = keys.shape
    grouped = query.float().reshape(len(query), num_kv_heads, -1, head_size)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, keys) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.float().reshape(num_kv_heads, -1, 1, 1)
        scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], dim=-1)
    # A row that sees nothing gives zeros, not the NaN of an empty softmax.
    weights = scores.softmax(-1)[..., :num_keys].masked_fill(~visible, 0.0)
    attended = torch.einsum("hgqk,khd->qhgd", weights, values)
    return attended.flatten(1, 2).to(query.dtype)
