"""How often successors of a weight turned out right."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.successors import (
    BIN_WIDTH,
    NONE,
    NUM_BINS,
    log_weights,
    look_up,
)


@triton.jit
def _learn_rates_kernel(
    before_ptr,
    token_ids_ptr,
    emitted_ptr,
    emitted_stride,
    num_emitted_ptr,
    max_depth,
    vocab_size,
    num_rows,
    owners_ptr,
    table_ids_ptr,
    table_weights_ptr,
    k,
    right_ptr,
    known_ptr,
    BLOCK_K: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    before = tl.load(before_ptr + req).to(tl.int64)
    token_id = tl.load(token_ids_ptr + req).to(tl.int64)
    num_levels = tl.minimum(tl.load(num_emitted_ptr + req), max_depth)
    ranks = tl.arange(0, BLOCK_K)
    level = 0
    # a node is in the tree if all on the way to it were right
    while level < num_levels:
        said = tl.load(emitted_ptr + req * emitted_stride + level).to(tl.int64)
        row, is_pair = look_up(before, token_id, vocab_size, num_rows, owners_ptr)
        place = row * k + ranks
        ids = tl.load(table_ids_ptr + place, mask=ranks < k, other=NONE)
        weights = tl.load(table_weights_ptr + place, mask=ranks < k, other=0.0)
        is_known = ids != NONE
        is_right = is_known & (ids == said)
        bins = (log_weights(weights) / (-BIN_WIDTH)).to(tl.int32)
        bins = tl.minimum(tl.maximum(bins, 0), NUM_BINS - 1)
        bins += tl.where(is_pair, NUM_BINS, 0)
        one = tl.full([BLOCK_K], 1.0, tl.float32)
        # all add the same, so that the order does not matter
        tl.atomic_add(known_ptr + bins, one, mask=is_known, sem="relaxed")
        tl.atomic_add(right_ptr + bins, one, mask=is_right, sem="relaxed")
        is_on = tl.max(is_right.to(tl.int32), axis=0) > 0
        before, token_id = token_id, said
        level = tl.where(is_on, level + 1, num_levels)


def learn_rates(
    before: torch.Tensor,  # [num_reqs] int64, the token before a root, NONE: none
    token_ids: torch.Tensor,  # [num_reqs] int64, that trees were rooted at
    emitted: torch.Tensor,  # [num_reqs, max_emitted] int64, what the target said
    num_emitted: torch.Tensor,  # [num_reqs] int32, columns past it are stale
    vocab_size: int,
    owners: torch.Tensor,  # [num_rows] int64
    table_ids: torch.Tensor,  # [num_rows, k] int32
    table_weights: torch.Tensor,  # [num_rows, k] float32
    max_depth: int,  # of the table's trees
    right: torch.Tensor,  # [2, NUM_BINS] float32, updated: by token's and pair's rows
    known: torch.Tensor,  # [2, NUM_BINS] float32, updated
) -> None:
    """Compare what the target said with the table, before it learns from that.

    A successor is right or wrong where its parent was accepted, in the tree of this table
    alone, however much of it was verified.
    """
    num_reqs = before.shape[0]
    if min(t.shape[0] for t in (token_ids, emitted, num_emitted)) < num_reqs:
        raise ValueError(f"roots of {num_reqs} requests need as many rows emitted")
    if emitted.shape[1] > 1 and emitted.stride(1) != 1:
        raise ValueError("the last dimension of emitted must be contiguous")
    _learn_rates_kernel[(num_reqs,)](
        before,
        token_ids,
        emitted,
        emitted.stride(0),
        num_emitted,
        min(max_depth, emitted.shape[1]),
        vocab_size,
        table_ids.shape[0],
        owners,
        table_ids,
        table_weights,
        table_ids.shape[1],
        right,
        known,
        BLOCK_K=triton.next_power_of_2(table_ids.shape[1]),
        num_warps=1,
    )
