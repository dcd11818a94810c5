"""Which candidates are worth verifying."""

import torch
import triton
import triton.language as tl

MIN_BLOCK = 32


@triton.jit(do_not_specialize=["num_nodes"])
def _select_nodes_kernel(
    slots_ptr,
    token_ids_ptr,
    parents_ptr,
    scores_ptr,
    proposers_ptr,
    candidates_stride,
    num_candidates_ptr,
    max_nodes_ptr,
    chain_only_ptr,
    num_sampled_ptr,
    num_nodes,
    tree_token_ids_ptr,
    tree_parents_ptr,
    tree_proposers_ptr,
    tree_stride,
    tree_num_nodes_ptr,
    draft_tokens_ptr,
    max_num_drafts,
    BLOCK_CANDIDATES: tl.constexpr,
    BLOCK_DRAFTS: tl.constexpr,
):
    # a key is a candidate's cost, as the bits of a float >= 0, above its index
    DROPPED: tl.constexpr = 0x7F800000 << 32  # an infinite cost
    req = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + req).to(tl.int64)
    row = slot * candidates_stride
    candidates = tl.arange(0, BLOCK_CANDIDATES)
    is_candidate = candidates < tl.load(num_candidates_ptr + slot)

    # every candidate climbs to the root and costs as much as the worst on its way, so no
    # child is cheaper than its parent, whatever the scores are
    costs = tl.where(is_candidate, 0.0, float("inf"))
    ancestors = tl.where(is_candidate, candidates, -1)
    while tl.max(ancestors, axis=0) >= 0:
        is_real = ancestors >= 0
        scores = tl.load(scores_ptr + row + ancestors, mask=is_real, other=0.0)
        # first, because tl.maximum would overlook a NaN
        scores = tl.where(scores == scores, scores, float("-inf"))
        costs = tl.maximum(costs, 0.0 - scores)
        ancestors = tl.load(parents_ptr + row + ancestors, mask=is_real, other=-1)
    keys = (costs.to(tl.int32, bitcast=True).to(tl.int64) << 32) | candidates

    if tl.load(chain_only_ptr + slot) != 0:
        parents = tl.load(parents_ptr + row + candidates, mask=is_candidate, other=-1)
        on_path = tl.full([BLOCK_CANDIDATES], 0, tl.int32)
        best = tl.full((), -1, tl.int64)
        while best < DROPPED:
            # the root's children have parent -1, as -1 has in its low half
            node = best.to(tl.int32)
            best = tl.min(tl.where(parents == node, keys, DROPPED), axis=0)
            on_path |= (keys == best).to(tl.int32)
        keys = tl.where(on_path > 0, keys, keys | DROPPED)

    ranked_keys = tl.sort(keys)
    num_kept = tl.sum((ranked_keys < DROPPED).to(tl.int32), axis=0)
    num_kept = tl.minimum(num_kept, tl.load(max_nodes_ptr + slot))
    num_kept = tl.maximum(tl.minimum(num_kept, num_nodes), 0)
    num_kept = tl.where(tl.load(num_sampled_ptr + req) > 0, num_kept, 0)
    drafts = candidates
    is_kept = drafts < num_kept
    sources = ranked_keys.to(tl.int32)  # draft -> candidate

    # a parent's draft is the number of keys below its own, found by bisection
    parents = tl.load(parents_ptr + row + sources, mask=is_kept, other=-1)
    parent_keys = tl.gather(keys, tl.maximum(parents, 0), axis=0)
    parent_drafts = tl.full([BLOCK_CANDIDATES], 0, tl.int32)
    step = BLOCK_CANDIDATES // 2
    while step > 0:
        probes = parent_drafts + step
        is_below = tl.gather(ranked_keys, probes - 1, axis=0) < parent_keys
        parent_drafts = tl.where(is_below, probes, parent_drafts)
        step //= 2
    parent_nodes = tl.where(parents >= 0, parent_drafts + 1, 0)
    token_ids = tl.load(token_ids_ptr + row + sources, mask=is_kept, other=0)
    proposers = tl.load(proposers_ptr + row + sources, mask=is_kept, other=0)

    tree = slot * tree_stride
    tl.store(tree_num_nodes_ptr + slot, num_kept + 1)
    tl.store(tree_token_ids_ptr + tree, 0)
    tl.store(tree_parents_ptr + tree, -1)
    tl.store(tree_proposers_ptr + tree, 0)
    tl.store(tree_token_ids_ptr + tree + 1 + drafts, token_ids, mask=is_kept)
    tl.store(tree_parents_ptr + tree + 1 + drafts, parent_nodes, mask=is_kept)
    tl.store(tree_proposers_ptr + tree + 1 + drafts, proposers, mask=is_kept)

    draft_tokens_ptr += req * max_num_drafts
    tl.store(draft_tokens_ptr + drafts, token_ids.to(tl.int64), mask=is_kept)
    columns = tl.arange(0, BLOCK_DRAFTS)
    is_unused = (columns >= num_kept) & (columns < max_num_drafts)
    unused = tl.full([BLOCK_DRAFTS], 0, tl.int64)
    tl.store(draft_tokens_ptr + columns, unused, mask=is_unused)


def select_nodes(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    token_ids: torch.Tensor,  # [max_num_reqs, max_num_candidates] int32
    parents: torch.Tensor,  # [max_num_reqs, max_num_candidates] int32, -1: root
    scores: torch.Tensor,  # [max_num_reqs, max_num_candidates] float32, path log-prob
    proposers: torch.Tensor,  # [max_num_reqs, max_num_candidates] int32, bit per proposer
    num_candidates: torch.Tensor,  # [max_num_reqs] int32
    max_nodes: torch.Tensor,  # [max_num_reqs] int32, most nodes to keep, root excluded
    chain_only: torch.Tensor,  # [max_num_reqs] bool or int32, keep a single path
    num_sampled: torch.Tensor,  # [num_reqs] int32, 0: no token to continue, so no nodes
    num_nodes: int,  # most nodes to keep of any request
    tree_token_ids: torch.Tensor,  # out [max_num_reqs, max_num_nodes] int32, root 0
    tree_parents: torch.Tensor,  # out [max_num_reqs, max_num_nodes] int32, root -1
    tree_proposers: torch.Tensor,  # out [max_num_reqs, max_num_nodes] int32, root 0
    tree_num_nodes: torch.Tensor,  # out [max_num_reqs] int32, root included
    draft_tokens: torch.Tensor,  # out [num_reqs, max_num_nodes - 1] int64, 0 if unused,
    # contiguous
) -> None:
    """Keep the most probable candidates, best first, as the slots' new trees.

    A candidate is worth the lowest score on its path, its own included and positive ones
    counted as 0. So the best nodes are closed under ancestors, and so is any prefix of
    them; ties go to the lower index, which parents have. Candidates of score NaN or -inf
    go, descendants included. A single path takes the best child from the root on. Tree
    columns past ``tree_num_nodes`` keep what they held.
    """
    num_reqs, max_num_candidates = slots.shape[0], token_ids.shape[1]
    max_num_drafts = draft_tokens.shape[1]
    columns = (token_ids, parents, scores, proposers)
    trees = (tree_token_ids, tree_parents, tree_proposers)
    if max_num_candidates < 1:
        raise ValueError("select_nodes needs room for at least 1 candidate")
    for names, tensors in (
        ("token_ids, parents, scores and proposers", columns),
        ("tree_token_ids, tree_parents and tree_proposers", trees),
    ):
        layouts = {(t.shape, t.stride(0) if t.shape[0] > 1 else 0) for t in tensors}
        if len(layouts) > 1:
            raise ValueError(f"{names} must have one shape and one stride: {layouts}")
    if max_num_drafts + 1 != tree_parents.shape[1]:
        raise ValueError(
            f"draft_tokens has {max_num_drafts} columns, expected one less than the "
            f"{tree_parents.shape[1]} nodes of the tree"
        )
    per_slot = (num_candidates, max_nodes, chain_only)
    if any(t.shape[0] < token_ids.shape[0] for t in per_slot):
        raise ValueError(f"every per-slot tensor must have {token_ids.shape[0]} slots")
    if min(num_sampled.shape[0], draft_tokens.shape[0]) < num_reqs:
        raise ValueError(f"num_sampled and draft_tokens must have {num_reqs} rows")
    vectors = (slots, *per_slot, num_sampled, tree_num_nodes)
    if not draft_tokens.is_contiguous() or any(
        t.shape[-1] > 1 and t.stride(-1) != 1 for t in (*vectors, *columns, *trees)
    ):
        raise ValueError(
            "draft_tokens and the last dimension of every tensor must be contiguous"
        )
    _select_nodes_kernel[(num_reqs,)](
        slots,
        *columns,
        token_ids.stride(0),
        num_candidates,
        max_nodes,
        chain_only,
        num_sampled,
        min(num_nodes, max_num_drafts),
        *trees,
        tree_parents.stride(0),
        tree_num_nodes,
        draft_tokens,
        max_num_drafts,
        BLOCK_CANDIDATES=max(triton.next_power_of_2(max_num_candidates), MIN_BLOCK),
        BLOCK_DRAFTS=triton.next_power_of_2(max(max_num_drafts, 1)),
    )
