"""The likeliest paths that the table of successors knows."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.successors import (
    NONE,
    NUM_BINS,
    log_rates,
    log_weights,
    look_up,
)


@triton.jit
def _cheapest(bits, most, BLOCK: tl.constexpr):
    """Places of the ``most`` least costs, in their order; of equal ones the first.

    Bits of floats that are not negative are in their order. To sort a thousand of them
    takes the compiler minutes.
    """
    threshold = tl.full((), 0, tl.int32)
    for shift in range(0, 31):
        probe = threshold | (1 << (30 - shift))
        # too few are below it: the last one kept costs at least that
        num_below = tl.sum((bits < probe).to(tl.int32), axis=0)
        threshold = tl.where(num_below < most, probe, threshold)
    is_below = (bits < threshold).to(tl.int32)
    is_even = (bits == threshold).to(tl.int32)
    num_even = most - tl.sum(is_below, axis=0)
    is_kept = is_below | (
        is_even & (tl.cumsum(is_even, axis=0) <= num_even).to(tl.int32)
    )
    num_kept = tl.cumsum(is_kept, axis=0)
    # the place of the n-th is the number of places with fewer up to there, bisected
    wanted = tl.arange(0, BLOCK)
    places = tl.full([BLOCK], 0, tl.int32)
    step = bits.shape[0] // 2
    while step > 0:
        is_fewer = tl.gather(num_kept, places + step - 1, axis=0) <= wanted
        places = tl.where(is_fewer, places + step, places)
        step //= 2
    return places


@triton.jit
def _grow_paths_kernel(
    before_ptr,
    token_ids_ptr,
    active_ptr,
    vocab_size,
    num_rows,
    owners_ptr,
    table_ids_ptr,
    table_weights_ptr,
    k,
    knots_ptr,
    found_ptr,
    out_ids_ptr,
    out_parents_ptr,
    out_scores_ptr,
    out_stride,
    out_num_ptr,
    max_nodes,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):
    PLACES: tl.constexpr = DEPTH * BLOCK_NODES
    req = tl.program_id(0).to(tl.int64)
    if tl.load(active_ptr + req) == 0:
        tl.store(out_num_ptr + req, 0)
    else:
        # of this request: tokens, parents' places and costs as bits, level by level
        found_ptr += req * 3 * PLACES
        nodes = tl.arange(0, BLOCK_NODES)
        ranks = tl.arange(0, BLOCK_K)
        first = tl.zeros([BLOCK_NODES], tl.int64)
        before = first + tl.load(before_ptr + req).to(tl.int64)
        token_ids = first + tl.load(token_ids_ptr + req).to(tl.int64)
        costs = tl.where(nodes == 0, 0.0, float("inf"))
        for level in range(0, DEPTH):
            rows, is_pair = look_up(before, token_ids, vocab_size, num_rows, owners_ptr)
            is_open = costs < float("inf")
            known = is_open[:, None] & (ranks < k)[None, :]
            place = rows[:, None] * k + ranks[None, :]
            ids = tl.load(table_ids_ptr + place, mask=known, other=NONE)
            weights = tl.load(table_weights_ptr + place, mask=known, other=0.0)
            knots = knots_ptr + tl.where(is_pair, NUM_BINS, 0)
            log_probs = log_rates(log_weights(weights), knots[:, None])
            paths = tl.where(ids == NONE, float("inf"), costs[:, None] - log_probs)
            paths = tl.reshape(tl.maximum(paths, 0.0), [BLOCK_NODES * BLOCK_K])
            bits = paths.to(tl.int32, bitcast=True)
            path = _cheapest(bits, max_nodes, BLOCK_NODES)
            costs = tl.gather(paths, path, axis=0)
            costs = tl.where(nodes < max_nodes, costs, float("inf"))
            above, rank = path // BLOCK_K, path % BLOCK_K
            child = tl.load(
                table_ids_ptr + tl.gather(rows, above, axis=0) * k + rank,
                mask=rank < k,
                other=NONE,
            )
            before = tl.gather(token_ids, above, axis=0)
            token_ids = child.to(tl.int64)
            parent = tl.where(level == 0, -1, (level - 1) * BLOCK_NODES + above)
            here = found_ptr + level * BLOCK_NODES + nodes
            tl.store(here, child)
            tl.store(here + PLACES, parent)
            tl.store(here + 2 * PLACES, costs.to(tl.int32, bitcast=True))
        tl.debug_barrier()
        BLOCK_PLACES: tl.constexpr = triton.next_power_of_2(PLACES)
        places = tl.arange(0, BLOCK_PLACES)
        bits = tl.load(
            found_ptr + 2 * PLACES + places, mask=places < PLACES, other=0x7F800000
        )
        best = _cheapest(bits, max_nodes, BLOCK_NODES)
        bits = tl.where(nodes < max_nodes, tl.gather(bits, best, axis=0), 0x7F800000)
        # a parent costs no more than its child and has a lower place: it comes first
        best = tl.sort((bits.to(tl.int64) << 32) | best)
        costs = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        is_kept = costs < float("inf")
        place = best.to(tl.int32)
        parents = tl.load(found_ptr + PLACES + place, mask=is_kept, other=-1)
        parent_bits = tl.load(
            found_ptr + 2 * PLACES + parents, mask=parents >= 0, other=0
        )
        parent_keys = (parent_bits.to(tl.int64) << 32) | tl.maximum(parents, 0)
        # a parent's rank is the number of keys below its own
        is_below = best[None, :] < parent_keys[:, None]
        parent_ranks = tl.sum(is_below.to(tl.int32), axis=1)
        parent_ranks = tl.where(parents >= 0, parent_ranks, -1)
        out = req * out_stride + nodes
        child = tl.load(found_ptr + place, mask=is_kept, other=0)
        tl.store(out_ids_ptr + out, child, mask=is_kept)
        tl.store(out_parents_ptr + out, parent_ranks, mask=is_kept)
        tl.store(out_scores_ptr + out, 0.0 - costs, mask=is_kept)
        tl.store(out_num_ptr + req, tl.sum(is_kept.to(tl.int32), axis=0))


def num_places(depth: int, max_nodes: int) -> int:
    """How wide ``found`` must be."""
    return 3 * depth * int(triton.next_power_of_2(max_nodes))


def grow_paths(
    before: torch.Tensor,  # [num_reqs] int64, the token before the newest, NONE: none
    token_ids: torch.Tensor,  # [num_reqs] int64, the newest
    active: torch.Tensor,  # [num_reqs] int32 or bool, 0: no candidates
    vocab_size: int,
    owners: torch.Tensor,  # [num_rows] int64
    table_ids: torch.Tensor,  # [num_rows, k] int32
    table_weights: torch.Tensor,  # [num_rows, k] float32
    knots: torch.Tensor,  # [2, NUM_BINS] float32, of tokens' rows and of pairs'
    depth: int,
    found: torch.Tensor,  # scratch [max_num_reqs, num_places(depth, max_nodes)] int32
    out_ids: torch.Tensor,  # out [max_num_reqs, max_nodes] int32
    out_parents: torch.Tensor,  # out [max_num_reqs, max_nodes] int32, -1: the root
    out_scores: torch.Tensor,  # out [max_num_reqs, max_nodes] float32, path log-prob
    out_num: torch.Tensor,  # out [max_num_reqs] int32
) -> None:
    """Write every request's likeliest paths, best first; columns past ``out_num`` keep
    what they held.

    Of the best ``max_nodes`` paths no level has more, so keeping as many of every level
    finds them.
    """
    num_reqs, max_nodes = before.shape[0], out_ids.shape[1]
    if min(token_ids.shape[0], active.shape[0]) < num_reqs:
        raise ValueError(f"token_ids and active must have {num_reqs} rows")
    width = num_places(depth, max_nodes)
    if found.shape[0] < num_reqs or found.shape[1] != width:
        raise ValueError(
            f"found {tuple(found.shape)}, expected {num_reqs} rows of {width}"
        )
    outs = (out_ids, out_parents, out_scores)
    if len({(each.shape, each.stride(0)) for each in outs}) > 1 or any(
        not each.is_contiguous() for each in (found, table_ids, table_weights, knots)
    ):
        raise ValueError("found, the table and knots must be contiguous, outs alike")
    _grow_paths_kernel[(num_reqs,)](
        before,
        token_ids,
        active,
        vocab_size,
        table_ids.shape[0],
        owners,
        table_ids,
        table_weights,
        table_ids.shape[1],
        knots,
        found,
        *outs,
        out_ids.stride(0),
        out_num,
        max_nodes,
        DEPTH=depth,
        BLOCK_K=triton.next_power_of_2(table_ids.shape[1]),
        BLOCK_NODES=triton.next_power_of_2(max_nodes),
    )
