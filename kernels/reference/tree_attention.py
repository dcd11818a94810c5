"""Attention over a tree, one request at a time."""

import torch

from vllm_treespec.kernels.attention_plan import SplitBuffers

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
    split: SplitBuffers | None = None,
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
            _gather(key_cache, block_table[req], keys),
            _gather(value_cache, block_table[req], keys),
            visible[:, keys],
            scale,
            soft_cap,
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
) -> torch.Tensor:  # [num_keys, num_kv_heads, head_size]
    block_size = cache.shape[2]
    return cache[blocks[keys // block_size].long(), :, keys % block_size]


def _attend(
    query: torch.Tensor,  # [query_len, num_heads, head_size]
    keys: torch.Tensor,  # [num_keys, num_kv_heads, head_size]
    values: torch.Tensor,  # as keys
    visible: torch.Tensor,  # [query_len, num_keys] bool
    scale: float,
    soft_cap: float | None,
) -> torch.Tensor:  # [query_len, num_heads, head_size]
    grouped = query.float().reshape(len(query), keys.shape[1], -1, query.shape[2])
    scores = torch.einsum("qhgd,khd->hgqk", grouped, keys.float()) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    # A row that sees nothing gives zeros, not the NaN of an empty softmax.
    weights = weights.masked_fill(~visible, 0.0)
    attended = torch.einsum("hgqk,khd->qhgd", weights, values.float())
    return attended.flatten(1, 2).to(query.dtype)
