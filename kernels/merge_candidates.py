"""Several proposers' candidate trees become one."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.voices import of_parents

MAX_PROPOSERS = 31  # one bit per proposer, and the sign left alone
MIN_BLOCK = 32


@triton.jit
def _merge_candidates_kernel(
    slots_ptr,
    token_ids_ptr,
    parents_ptr,
    scores_ptr,
    candidates_proposer_stride,
    candidates_req_stride,
    num_candidates_ptr,
    num_candidates_stride,
    merged_token_ids_ptr,
    merged_parents_ptr,
    merged_proposers_ptr,
    own_scores_ptr,
    own_scores_proposer_stride,
    merged_stride,
    num_merged_ptr,
    sibling_bits_ptr,
    num_proposers,
    max_num_merged,
    BLOCK_CANDIDATES: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + req).to(tl.int64)
    token_ids_ptr += req * candidates_req_stride
    parents_ptr += req * candidates_req_stride
    scores_ptr += req * candidates_req_stride
    num_candidates_ptr += req
    own_scores_ptr += slot * merged_stride

    candidates = tl.arange(0, BLOCK_CANDIDATES)
    nodes = tl.arange(0, BLOCK_NODES)
    merged_token_ids = tl.full([BLOCK_NODES], 0, tl.int32)
    merged_parents = tl.full([BLOCK_NODES], 0, tl.int32)
    merged_proposers = tl.full([BLOCK_NODES], 0, tl.int32)
    num_merged = tl.full((), 0, tl.int32)
    child_bits = tl.full([BLOCK_NODES], 0, tl.int32)
    root_bits = tl.full((), 0, tl.int32)
    for proposer in range(num_proposers):
        own_scores = tl.full([BLOCK_NODES], float("-inf"), tl.float32)
        # candidate -> its node, plus 1: parent -1 finds nothing, sums to 0, is node -1
        node_of = tl.full([BLOCK_CANDIDATES], 0, tl.int32)
        num_candidates = tl.load(num_candidates_ptr)
        # parents precede children, so the first candidate is a child of the root
        root_bits |= (num_candidates > 0).to(tl.int32) << proposer
        for candidate in range(num_candidates):
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
            child_bits |= tl.where(nodes == parent_node, 1 << proposer, 0)
            # not tl.maximum: a NaN compares false, so it counts as -inf
            is_better = is_node & (score > own_scores)
            own_scores = tl.where(is_better, score, own_scores)
        # of all columns: proposers to come may add nodes that this one does not have
        tl.store(own_scores_ptr + nodes, own_scores, mask=nodes < max_num_merged)
        own_scores_ptr += own_scores_proposer_stride
        token_ids_ptr += candidates_proposer_stride
        parents_ptr += candidates_proposer_stride
        scores_ptr += candidates_proposer_stride
        num_candidates_ptr += num_candidates_stride

    offsets = slot * merged_stride + nodes
    is_merged = nodes < num_merged
    tl.store(merged_token_ids_ptr + offsets, merged_token_ids, mask=is_merged)
    tl.store(merged_parents_ptr + offsets, merged_parents, mask=is_merged)
    tl.store(merged_proposers_ptr + offsets, merged_proposers, mask=is_merged)
    tl.store(num_merged_ptr + slot, num_merged)
    sibling_bits = of_parents(child_bits, merged_parents, root_bits)
    tl.store(sibling_bits_ptr + offsets, sibling_bits, mask=is_merged)


def merge_candidates(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    token_ids: torch.Tensor,  # [num_proposers, num_reqs, max_num_candidates] int32
    parents: torch.Tensor,  # [num_proposers, num_reqs, max_num_candidates] int32, -1: root
    scores: torch.Tensor,  # [num_proposers, num_reqs, max_num_candidates] float32
    num_candidates: torch.Tensor,  # [num_proposers, num_reqs] int32
    merged_token_ids: torch.Tensor,  # out [max_num_reqs, max_num_merged] int32
    merged_parents: torch.Tensor,  # out [max_num_reqs, max_num_merged] int32, -1: root
    merged_proposers: torch.Tensor,  # out [max_num_reqs, max_num_merged] int32, bit per
    # proposer
    own_scores: torch.Tensor,  # out [num_proposers, max_num_reqs, max_num_merged]
    # float32, -inf: it did not propose this
    num_merged: torch.Tensor,  # out [max_num_reqs] int32
    sibling_bits: torch.Tensor,  # out [max_num_reqs, max_num_merged] int32, bit per
    # proposer of the node or of another child of its parent
) -> None:
    """Unite the proposers' trees: one node per distinct path of tokens from the root.

    Parents precede their children, before and after. A proposer's own score of a node is
    the best that it gave it, and NaN counts as -inf. Columns past ``num_merged`` keep
    what they held, but for own scores, which are -inf there.
    """
    num_proposers, num_reqs, max_num_candidates = token_ids.shape
    candidates = (token_ids, parents, scores)
    merged = (
        merged_token_ids,
        merged_parents,
        merged_proposers,
        own_scores[0],
        sibling_bits,
    )
    if not 1 <= num_proposers <= MAX_PROPOSERS:
        raise ValueError(f"{num_proposers} proposers, must be in [1, {MAX_PROPOSERS}]")
    if num_candidates.shape != (num_proposers, num_reqs):
        raise ValueError(
            f"num_candidates {tuple(num_candidates.shape)} must go with token_ids "
            f"{tuple(token_ids.shape)}"
        )
    if own_scores.shape[0] != num_proposers:
        raise ValueError(
            f"own_scores has {own_scores.shape[0]} proposers of {num_proposers}"
        )
    max_num_merged = merged_token_ids.shape[1]
    if max_num_merged < max(num_proposers * max_num_candidates, 1):
        raise ValueError(
            f"{num_proposers} proposers of {max_num_candidates} candidates may need as "
            f"many nodes as that, merged_token_ids has {max_num_merged}"
        )
    for names, tensors in (
        ("token_ids, parents and scores", candidates),
        ("the merged tensors", merged),
    ):
        layouts = {(t.shape, t.stride()) for t in tensors}
        if len(layouts) > 1:
            raise ValueError(f"{names} must have one shape and one stride: {layouts}")
    if slots.shape[0] != num_reqs:
        raise ValueError(f"{slots.shape[0]} slots for {num_reqs} requests")
    vectors = (slots, num_candidates, num_merged)
    if any(
        t.shape[-1] > 1 and t.stride(-1) != 1 for t in (*vectors, *candidates, *merged)
    ):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _merge_candidates_kernel[(num_reqs,)](
        slots,
        *candidates,
        token_ids.stride(0),
        token_ids.stride(1),
        num_candidates,
        num_candidates.stride(0),
        merged_token_ids,
        merged_parents,
        merged_proposers,
        own_scores,
        own_scores.stride(0),
        merged_token_ids.stride(0),
        num_merged,
        sibling_bits,
        num_proposers,
        max_num_merged,
        BLOCK_CANDIDATES=triton.next_power_of_2(max(max_num_candidates, 1)),
        BLOCK_NODES=max(triton.next_power_of_2(max_num_merged), MIN_BLOCK),
        num_warps=1,  # two reductions per candidate: within a warp they need no barrier
    )
