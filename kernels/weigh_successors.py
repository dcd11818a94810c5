"""What a step teaches the table of successors: what, how much, and in which rows."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels import recycling
from vllm_treespec.kernels.successors import NONE, is_of, rows_of

PICK_WEIGHT = tl.constexpr(recycling.PICK_WEIGHT)


@triton.jit(do_not_specialize=["num_contexts"])
def _weigh_successors_kernel(
    before_ptr,
    token_ids_ptr,
    num_contexts,
    best_ids_ptr,
    best_ids_stride,
    best_values_ptr,
    best_values_stride,
    num_best,
    picks_ptr,
    vocab_size,
    num_rows,
    keys_ptr,
    successors_ptr,
    weights_ptr,
    BLOCK_BEST: tl.constexpr,
):
    context = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, BLOCK_BEST)
    is_best = ranks < num_best
    best_ids = tl.load(
        best_ids_ptr + context * best_ids_stride + ranks, mask=is_best, other=0
    ).to(tl.int64)
    values = tl.load(
        best_values_ptr + context * best_values_stride + ranks,
        mask=is_best,
        other=float("-inf"),
    ).to(tl.float32)
    # among the best alone: to normalise over all would be to read them once more
    shares = tl.exp(values - tl.max(values, axis=0))
    total = tl.sum(shares, axis=0)
    pick = tl.load(picks_ptr + context).to(tl.int64)
    is_accepted = pick != NONE
    favourite = tl.load(best_ids_ptr + context * best_ids_stride).to(tl.int64)
    pick = tl.where(is_accepted, pick, favourite)
    is_pick = (best_ids == pick) & is_best
    # a pick that is none of the best takes the last one's place
    is_missing = tl.max(is_pick.to(tl.int32), axis=0) == 0
    is_pick = is_pick | (is_missing & (ranks == num_best - 1))
    weights = (1 - PICK_WEIGHT) * (shares / total) + tl.where(is_pick, PICK_WEIGHT, 0.0)
    place = context * num_best + ranks
    successors = tl.where(is_pick, pick, best_ids).to(tl.int32)
    tl.store(successors_ptr + place, successors, mask=is_best)
    tl.store(weights_ptr + place, weights, mask=is_best)

    # NaN, +inf or nothing but -inf make the total NaN
    is_sound = (total == total) & is_of(pick, vocab_size)
    token_id = tl.load(token_ids_ptr + context).to(tl.int64)
    token_id = tl.where(is_sound, token_id, NONE)
    before = tl.load(before_ptr + context).to(tl.int64)
    token_row, pair_row = rows_of(before, token_id, vocab_size, num_rows)
    # what was only guessed counts as older
    order = context + tl.where(is_accepted, num_contexts, 0)
    tl.store(keys_ptr + context, (token_row << 32) | order)
    tl.store(keys_ptr + num_contexts + context, (pair_row << 32) | order)


def weigh_successors(
    before: torch.Tensor,  # [num_contexts] int64, the token before, NONE: there is none
    token_ids: torch.Tensor,  # [num_contexts] int64, NONE: teaches nothing
    best_ids: torch.Tensor,  # [num_contexts, num_best] int64, best first
    best_values: torch.Tensor,  # [num_contexts, num_best] float, their logits
    picks: torch.Tensor,  # [num_contexts] int64, NONE: only a guess led here
    vocab_size: int,
    num_rows: int,  # of the table
    keys: torch.Tensor,  # out [2 * num_contexts] int64, by token and by pair: the row
    # times 2**32, and below it the order: the greatest is the newest
    successors: torch.Tensor,  # out [num_contexts, num_best] int32, distinct
    weights: torch.Tensor,  # out [num_contexts, num_best] float32, 1 per context
) -> None:
    """Weigh what followed each context: half for the pick, half by the best logits.

    Masked tokens have no share. Broken logits and picks that are no tokens teach
    nothing: their row is the last one, which is nobody's.
    """
    num_contexts, num_best = successors.shape
    shape = (num_contexts, num_best)
    if best_ids.shape != shape or best_values.shape != shape or weights.shape != shape:
        raise ValueError(f"best_ids, best_values and weights must be {shape}")
    if keys.shape[0] != 2 * num_contexts:
        raise ValueError(f"keys has {keys.shape[0]} places, not {2 * num_contexts}")
    _weigh_successors_kernel[(num_contexts,)](
        before,
        token_ids,
        num_contexts,
        best_ids,
        best_ids.stride(0),
        best_values,
        best_values.stride(0),
        num_best,
        picks,
        vocab_size,
        num_rows,
        keys,
        successors,
        weights,
        BLOCK_BEST=triton.next_power_of_2(num_best),
        num_warps=1,
    )
