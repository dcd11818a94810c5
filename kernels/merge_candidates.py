"""Several proposers' candidate trees become one."""

import torch
import triton
import triton.language as tl

MAX_PROPOSERS = 31  # one bit per proposer, and the sign left alone


@triton.jit
def _merge_candidates_kernel(
    token_ids_ptr,
    token_ids_proposer_stride,
    token_ids_req_stride,
    parents_ptr,
    parents_proposer_stride,
    parents_req_stride,
    scores_ptr,
    scores_proposer_stride,
    scores_req_stride,
    num_candidates_ptr,
    num_candidates_stride,
    merged_token_ids_ptr,
    merged_parents_ptr,
    merged_scores_ptr,
    merged_proposers_ptr,
    merged_stride,
    num_merged_ptr,
    num_proposers,
    BLOCK_CANDIDATES: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    token_ids_ptr += req * token_ids_req_stride
    parents_ptr += req * parents_req_stride
    scores_ptr += req * scores_req_stride
    num_candidates_ptr += req

    candidates = tl.arange(0, BLOCK_CANDIDATES)
    nodes = tl.arange(0, BLOCK_NODES)
    merged_token_ids = tl.full([BLOCK_NODES], 0, tl.int32)
    merged_parents = tl.full([BLOCK_NODES], 0, tl.int32)
    merged_scores = tl.full([BLOCK_NODES], float("-inf"), tl.float32)
    merged_proposers = tl.full([BLOCK_NODES], 0, tl.int32)
    num_merged = tl.full((), 0, tl.int32)
    for proposer in range(num_proposers):
        # candidate -> its node, plus 1: parent -1 finds nothing, sums to 0, is node -1
        node_of = tl.full([BLOCK_CANDIDATES], 0, tl.int32)
        for candidate in range(tl.load(num_candidates_ptr)):
            token_id = tl.load(token_ids_ptr + candidate)
            parent = tl.load(parents_ptr + candidate)
            score = tl.load(scores_ptr + candidate)
            parent_node = tl.sum(tl.where(candidates == parent, node_of, 0), axis=0) - 1
            is_same = (merged_parents == parent_node) & (merged_token_ids == token_id)
            # places still empty may match as well, but none lies below num_merged
            node = tl.min(tl.where(is_same, nodes, num_merged), axis=0)
            num_merged = tl.maximum(num_merged, node + 1)
            node_of = tl.where(candidates == candidate, node + 1, node_of)

            is_node = nodes == node
            merged_token_ids = tl.where(is_node, token_id, merged_token_ids)
            merged_parents = tl.where(is_node, parent_node, merged_parents)
            merged_proposers |= tl.where(is_node, 1 << proposer, 0)
            # not tl.maximum: a NaN compares false, so it counts as -inf
            is_better = is_node & (score > merged_scores)
            merged_scores = tl.where(is_better, score, merged_scores)
        token_ids_ptr += token_ids_proposer_stride
        parents_ptr += parents_proposer_stride
        scores_ptr += scores_proposer_stride
        num_candidates_ptr += num_candidates_stride

    offsets = req * merged_stride + nodes
    is_merged = nodes < num_merged
    tl.store(merged_token_ids_ptr + offsets, merged_token_ids, mask=is_merged)
    tl.store(merged_parents_ptr + offsets, merged_parents, mask=is_merged)
    tl.store(merged_scores_ptr + offsets, merged_scores, mask=is_merged)
    tl.store(merged_proposers_ptr + offsets, merged_proposers, mask=is_merged)
    tl.store(num_merged_ptr + req, num_merged)


def merge_candidates(
    token_ids: torch.Tensor,  # [num_proposers, num_reqs, max_num_candidates] int32
    parents: torch.Tensor,  # [num_proposers, num_reqs, max_num_candidates] int32, -1: root
    scores: torch.Tensor,  # [num_proposers, num_reqs, max_num_candidates] float32
    num_candidates: torch.Tensor,  # [num_proposers, num_reqs] int32
    merged_token_ids: torch.Tensor,  # out [num_reqs, max_num_merged] int32
    merged_parents: torch.Tensor,  # out [num_reqs, max_num_merged] int32, -1: root
    merged_scores: torch.Tensor,  # out [num_reqs, max_num_merged] float32
    merged_proposers: torch.Tensor,  # out [num_reqs, max_num_merged] int32, bit per proposer
    num_merged: torch.Tensor,  # out [num_reqs] int32
) -> None:
    """Unite the proposers' trees: one node per distinct path of tokens from the root.

    Parents precede their children, before and after. A node keeps the best score
    that any proposer gave it, and NaN counts as -inf. Columns past ``num_merged`` keep
    what they held.
    """
    num_proposers, num_reqs, max_num_candidates = token_ids.shape
    merged = (merged_token_ids, merged_parents, merged_scores, merged_proposers)
    if not 1 <= num_proposers <= MAX_PROPOSERS:
        raise ValueError(f"{num_proposers} proposers, must be in [1, {MAX_PROPOSERS}]")
    if not token_ids.shape == parents.shape == scores.shape or (
        num_candidates.shape != (num_proposers, num_reqs)
    ):
        raise ValueError(
            f"parents {tuple(parents.shape)}, scores {tuple(scores.shape)} and "
            f"num_candidates {tuple(num_candidates.shape)} must go with token_ids "
            f"{tuple(token_ids.shape)}"
        )
    max_num_merged = merged_token_ids.shape[1]
    if max_num_merged < max(num_proposers * max_num_candidates, 1):
        raise ValueError(
            f"{num_proposers} proposers of {max_num_candidates} candidates may need as "
            f"many nodes as that, merged_token_ids has {max_num_merged}"
        )
    if len({(t.shape, t.stride(0) if t.shape[0] > 1 else 0) for t in merged}) > 1:
        raise ValueError("the merged tensors must have one shape and one stride")
    if min(merged_token_ids.shape[0], num_merged.shape[0]) < num_reqs:
        raise ValueError(f"the merged tensors are shorter than {num_reqs} requests")
    inputs = (token_ids, parents, scores, num_candidates)
    if any(
        t.shape[-1] > 1 and t.stride(-1) != 1 for t in (*inputs, *merged, num_merged)
    ):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _merge_candidates_kernel[(num_reqs,)](
        token_ids,
        token_ids.stride(0),
        token_ids.stride(1),
        parents,
        parents.stride(0),
        parents.stride(1),
        scores,
        scores.stride(0),
        scores.stride(1),
        num_candidates,
        num_candidates.stride(0),
        *merged,
        merged_token_ids.stride(0),
        num_merged,
        num_proposers,
        BLOCK_CANDIDATES=triton.next_power_of_2(max(max_num_candidates, 1)),
        BLOCK_NODES=triton.next_power_of_2(max_num_merged),
        num_warps=1,  # two reductions per candidate: within a warp they need no barrier
    )
