"""What followed some contexts is blended into their rows, the newest last."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels import recycling
from vllm_treespec.kernels.successors import NONE, owner_of_pair

RATE = tl.constexpr(recycling.RATE)


@triton.jit
def _blend(new_ids, new_weights, num_new, old_ids, old_weights, BLOCK: tl.constexpr):
    """The heaviest of both, heaviest first, in as many places as there are old ones."""
    BLOCK_NEW: tl.constexpr = new_ids.shape[0]
    BLOCK_OLD: tl.constexpr = old_ids.shape[0]
    is_same = (new_ids[:, None] == old_ids[None, :]) & (old_ids >= 0)[None, :]
    # one old one at most is the same, so the sum has no order
    met = tl.sum(tl.where(is_same, old_weights[None, :], 0.0), axis=1)
    new_weights = RATE * new_weights + met
    is_met = tl.max(is_same.to(tl.int32), axis=0) > 0
    old_weights = tl.where(is_met, 0.0, old_weights)
    column = tl.arange(0, BLOCK)
    is_new = column < num_new
    new_place = tl.minimum(column, BLOCK_NEW - 1)
    old_place = tl.minimum(tl.maximum(column - num_new, 0), BLOCK_OLD - 1)
    is_old = (column >= num_new) & (column - num_new < BLOCK_OLD)
    ids = tl.where(
        is_new,
        tl.gather(new_ids, new_place, axis=0),
        tl.gather(old_ids, old_place, axis=0),
    )
    weights = tl.where(
        is_new,
        tl.gather(new_weights, new_place, axis=0),
        tl.where(is_old, tl.gather(old_weights, old_place, axis=0), 0.0),
    )
    # bits of floats that are not negative are in their order
    lightness = 0x7FFFFFFF - weights.to(tl.int32, bitcast=True)
    ranked = tl.sort((lightness.to(tl.int64) << 32) | column)
    kept = tl.gather(ranked, tl.arange(0, BLOCK_OLD), axis=0).to(tl.int32)
    return tl.gather(ids, kept, axis=0), tl.gather(weights, kept, axis=0)


@triton.jit(do_not_specialize=["num_keys"])
def _blend_successors_kernel(
    keys_ptr,
    entries_ptr,
    num_keys,
    before_ptr,
    token_ids_ptr,
    successors_ptr,
    weights_ptr,
    num_new,
    vocab_size,
    nobody,
    owners_ptr,
    table_ids_ptr,
    table_weights_ptr,
    num_old,
    max_age,
    BLOCK_NEW: tl.constexpr,
    BLOCK_OLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    newest = tl.program_id(0)
    row = tl.load(keys_ptr + newest) >> 32
    is_last = newest + 1 >= num_keys
    following = tl.load(keys_ptr + newest + 1, mask=newest + 1 < num_keys, other=0)
    if (row < nobody) & (is_last | ((following >> 32) != row)):
        new = tl.arange(0, BLOCK_NEW)
        old = tl.arange(0, BLOCK_OLD)
        place = row * num_old + old
        is_place = old < num_old
        ids = tl.load(table_ids_ptr + place, mask=is_place, other=NONE)
        weights = tl.load(table_weights_ptr + place, mask=is_place, other=0.0)
        owner = tl.load(owners_ptr + row)
        for age in range(0, max_age):
            turn = newest + 1 - max_age + age
            key = tl.load(keys_ptr + turn, mask=turn >= 0, other=-1)
            if (key >> 32) == row:
                entry = tl.load(entries_ptr + turn)
                is_pair = entry >= num_keys // 2
                entry = tl.where(is_pair, entry - num_keys // 2, entry)
                before = tl.load(before_ptr + entry).to(tl.int64)
                token_id = tl.load(token_ids_ptr + entry).to(tl.int64)
                pair = owner_of_pair(before, token_id, vocab_size)
                own = tl.where(is_pair, pair, token_id)
                weights = tl.where(owner == own, weights * (1 - RATE), 0.0)
                owner = own
                learned = entry * num_new + new
                new_ids = tl.load(
                    successors_ptr + learned, mask=new < num_new, other=-2
                )
                new_weights = tl.load(
                    weights_ptr + learned, mask=new < num_new, other=0.0
                )
                ids, weights = _blend(
                    new_ids, new_weights, num_new, ids, weights, BLOCK
                )
                is_kept = is_place & (weights > 0)
                ids = tl.where(is_kept, ids, NONE)
                weights = tl.where(is_kept, weights, 0.0)
        tl.store(owners_ptr + row, owner)
        tl.store(table_ids_ptr + place, ids, mask=is_place)
        tl.store(table_weights_ptr + place, weights, mask=is_place)


def blend_successors(
    keys: torch.Tensor,  # [2 * num_contexts] int64, as ``weigh_successors`` writes them,
    # in ascending order
    entries: torch.Tensor,  # [2 * num_contexts] int64, where each was before
    before: torch.Tensor,  # [num_contexts] int64
    token_ids: torch.Tensor,  # [num_contexts] int64
    successors: torch.Tensor,  # [num_contexts, num_new] int32, distinct
    weights: torch.Tensor,  # [num_contexts, num_new] float32, at most 1 per context
    vocab_size: int,
    owners: torch.Tensor,  # [num_rows] int64, updated
    table_ids: torch.Tensor,  # [num_rows, num_old] int32, updated
    table_weights: torch.Tensor,  # [num_rows, num_old] float32, updated
    max_age: int,
) -> None:
    """Blend successors into the table's rows; what a row had counts for less than before.

    Of contexts that share a row, the ``max_age`` newest are blended one after the other,
    by one program: which of several a parallel write would keep is the device's mood, and
    tensor-parallel ranks would draft different trees.
    """
    num_new, (num_rows, num_old) = successors.shape[1], table_ids.shape
    if keys.shape != entries.shape or keys.shape[0] != 2 * successors.shape[0]:
        raise ValueError(
            f"{keys.shape[0]} keys and {entries.shape[0]} entries, expected "
            f"{2 * successors.shape[0]}"
        )
    contiguous = (keys, entries, successors, weights, owners, table_ids, table_weights)
    if not all(each.is_contiguous() for each in contiguous):
        raise ValueError("successors, weights, keys and the table must be contiguous")
    _blend_successors_kernel[(keys.shape[0],)](
        keys,
        entries,
        keys.shape[0],
        before,
        token_ids,
        successors,
        weights,
        num_new,
        vocab_size,
        num_rows - 1,
        owners,
        table_ids,
        table_weights,
        num_old,
        max_age,
        BLOCK_NEW=triton.next_power_of_2(num_new),
        BLOCK_OLD=triton.next_power_of_2(num_old),
        BLOCK=triton.next_power_of_2(num_new + num_old),
        num_warps=1,
    )
