"""Which guesses of the last step the target went along with, counted by their scores."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.bins import NUM_BINS, NUM_COMPANIES
from vllm_treespec.kernels.calibration import bin_places, company_rows, is_finite

MIN_BLOCK = 32


@triton.jit
def _tally_candidates_kernel(
    slots_ptr,
    merged_token_ids_ptr,
    merged_parents_ptr,
    proposers_ptr,
    own_scores_ptr,
    own_scores_proposer_stride,
    merged_stride,
    num_merged_ptr,
    offering_ptr,
    token_ids_ptr,
    token_ids_stride,
    num_tokens_ptr,
    num_emitted_ptr,
    right_ptr,
    known_ptr,
    num_proposers,
    BLOCK_NODES: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    num_emitted = tl.load(num_emitted_ptr + row)
    root = tl.load(num_tokens_ptr + slot) - num_emitted - 1
    nodes = tl.arange(0, BLOCK_NODES)
    is_node = nodes < tl.load(num_merged_ptr + slot)
    columns = slot * merged_stride + nodes
    parents = tl.load(merged_parents_ptr + columns, mask=is_node, other=-1)

    # Every node adds up what lies below an ancestor, and takes that ancestor's ancestor
    # next: each round skips twice as many levels as the one before.
    depths = tl.full([BLOCK_NODES], 1, tl.int32)
    ancestors = parents
    while tl.max(ancestors, axis=0) >= 0:
        is_real = ancestors >= 0
        sources = tl.maximum(ancestors, 0)
        depths += tl.where(is_real, tl.gather(depths, sources, axis=0), 0)
        ancestors = tl.where(is_real, tl.gather(ancestors, sources, axis=0), -1)

    is_known = is_node & (depths <= num_emitted)
    token_ids_ptr += slot * token_ids_stride + root
    emitted = tl.load(token_ids_ptr + depths, mask=is_known, other=0)
    proposed = tl.load(merged_token_ids_ptr + columns, mask=is_node, other=0)
    # what is not known yet contradicts nothing
    agrees = tl.where(is_known, (proposed == emitted).to(tl.int32), 1)
    ancestors = parents
    while tl.max(ancestors, axis=0) >= 0:
        is_real = ancestors >= 0
        sources = tl.maximum(ancestors, 0)
        agrees &= tl.where(is_real, tl.gather(agrees, sources, axis=0), 1)
        ancestors = tl.where(is_real, tl.gather(ancestors, sources, axis=0), -1)
    is_known |= is_node & (agrees == 0)

    bits = tl.load(proposers_ptr + columns, mask=is_node, other=0)
    offering = tl.load(offering_ptr + slot)
    # each adds 1, so that their order changes nothing, whatever was there
    ones = tl.full([BLOCK_NODES], 1.0, tl.float32)
    for proposer in range(num_proposers):
        scores = tl.load(own_scores_ptr + columns, mask=is_known, other=float("-inf"))
        is_counted = is_finite(scores)
        rows = company_rows(bits, proposer, offering)
        bins = bin_places(tl.where(is_counted, scores, 0.0), rows)
        tl.atomic_add(known_ptr + bins, ones, mask=is_counted, sem="relaxed")
        is_right = is_counted & (agrees > 0)
        tl.atomic_add(right_ptr + bins, ones, mask=is_right, sem="relaxed")
        own_scores_ptr += own_scores_proposer_stride


def tally_candidates(
    slots: torch.Tensor,  # [num_rows] int, batch row -> request slot
    merged_token_ids: torch.Tensor,  # [max_num_reqs, max_num_merged] int32
    merged_parents: torch.Tensor,  # [max_num_reqs, max_num_merged] int32, -1: root
    proposers: torch.Tensor,  # [max_num_reqs, max_num_merged] int32, bit per proposer
    own_scores: torch.Tensor,  # [num_proposers, max_num_reqs, max_num_merged] float32
    num_merged: torch.Tensor,  # [max_num_reqs] int32
    offering: torch.Tensor,  # [max_num_reqs] int32, bit per proposer with candidates
    token_ids: torch.Tensor,  # [max_num_reqs, max_num_tokens] int, a slot's whole text
    num_tokens: torch.Tensor,  # [max_num_reqs] int, of the text, stale columns past it
    num_emitted: torch.Tensor,  # [num_rows] int, of them the newest, said after the root
    right: torch.Tensor,  # [num_proposers * NUM_COMPANIES, NUM_BINS] float32, added to
    known: torch.Tensor,  # as right, added to
) -> None:
    """Count merged nodes by proposer, company and bin of its score of them.

    ``right`` counts nodes whose path, from the root to themselves, is how the emitted
    tokens begin; ``known`` those and the nodes on whose path some token differs. A
    path that is merely longer than what was said is neither. Parents precede children.
    Scores that are no finite number count for nobody.
    """
    num_proposers, *shape = own_scores.shape
    merged = (merged_token_ids, merged_parents, proposers, own_scores[0])
    if len({(t.shape, t.stride()) for t in merged}) > 1:
        raise ValueError("the merged tensors must have one shape and one stride")
    bins = (num_proposers * NUM_COMPANIES, NUM_BINS)
    for name, tensor in (("right", right), ("known", known)):
        if tensor.shape != bins or not tensor.is_contiguous():
            raise ValueError(
                f"{name} {tuple(tensor.shape)}, expected contiguous {bins}"
            )
    if num_emitted.shape[0] < slots.shape[0]:
        raise ValueError(f"num_emitted is shorter than {slots.shape[0]} rows")
    if min(num_merged.shape[0], offering.shape[0]) < shape[0]:
        raise ValueError(f"num_merged and offering must have {shape[0]} slots")
    if num_tokens.shape[0] < token_ids.shape[0]:
        raise ValueError(f"{num_tokens.shape[0]} lengths of {token_ids.shape[0]} texts")
    vectors = (slots, num_merged, offering, num_tokens, num_emitted)
    if any(
        t.shape[-1] > 1 and t.stride(-1) != 1 for t in (*vectors, *merged, token_ids)
    ):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _tally_candidates_kernel[(slots.shape[0],)](
        slots,
        merged_token_ids,
        merged_parents,
        proposers,
        own_scores,
        own_scores.stride(0),
        merged_parents.stride(0),
        num_merged,
        offering,
        token_ids,
        token_ids.stride(0),
        num_tokens,
        num_emitted,
        right,
        known,
        num_proposers,
        BLOCK_NODES=max(triton.next_power_of_2(shape[1]), MIN_BLOCK),
        num_warps=1,  # gathers and reductions: within a warp they need no barrier
    )
