"""What the target's words say of each voice, which spoke of them a step ago."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels import bins, mixing
from vllm_treespec.kernels.voices import mixed_odds, of_parents, said_by

NUM_COMPANIES = tl.constexpr(bins.NUM_COMPANIES)
NUM_SUMS = tl.constexpr(mixing.NUM_SUMS)
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
    sibling_bits_ptr,
    slopes_ptr,
    offsets_ptr,
    token_ids_ptr,
    token_ids_stride,
    num_tokens_ptr,
    num_emitted_ptr,
    sums_ptr,
    sums_row_stride,
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
        depths += of_parents(depths, ancestors, 0)
        ancestors = of_parents(ancestors, ancestors, -1)

    is_known = is_node & (depths <= num_emitted)
    token_ids_ptr += slot * token_ids_stride + root
    emitted = tl.load(token_ids_ptr + depths, mask=is_known, other=0)
    proposed = tl.load(merged_token_ids_ptr + columns, mask=is_node, other=0)
    agrees = (is_known & (proposed == emitted)).to(tl.int32)
    ancestors = parents
    while tl.max(ancestors, axis=0) >= 0:
        agrees &= of_parents(agrees, ancestors, 1)
        ancestors = of_parents(ancestors, ancestors, -1)
    # whether a child is likely given its parent is seen where the parent was right
    is_known &= of_parents(agrees, parents, 1) > 0

    bits = tl.load(proposers_ptr + columns, mask=is_node, other=0)
    sibling_bits = tl.load(sibling_bits_ptr + columns, mask=is_node, other=0)
    own_scores_ptr += columns
    odds, number = mixed_odds(
        own_scores_ptr,
        own_scores_proposer_stride,
        is_node,
        parents,
        bits,
        sibling_bits,
        slopes_ptr,
        offsets_ptr,
        0,
        num_proposers,
    )
    rates = 1.0 / (1.0 + tl.exp(-odds))
    # Those who speak of a child share its error. As each has 1 / number of a say, steps
    # that they take at the same time do not add up to too long a one.
    share = 1.0 / tl.maximum(number, 1.0)
    error = (rates - agrees.to(tl.float32)) * share
    bend = rates * (1.0 - rates) * share
    sums_ptr += row.to(tl.int64) * sums_row_stride
    for proposer in range(num_proposers):
        own_scores = tl.load(own_scores_ptr, mask=is_node, other=float("-inf"))
        odds, companies, speaks = said_by(
            own_scores, parents, bits, sibling_bits, proposer
        )
        own_scores_ptr += own_scores_proposer_stride
        for company in tl.static_range(NUM_COMPANIES):
            counts = is_known & speaks & (companies == company)
            one = counts.to(tl.float32)
            own_error = tl.where(counts, error, 0.0)
            own_bend = tl.where(counts, bend, 0.0)
            tl.store(sums_ptr, tl.sum(one, axis=0))
            tl.store(sums_ptr + 1, tl.sum(odds * own_error, axis=0))
            tl.store(sums_ptr + 2, tl.sum(own_error, axis=0))
            tl.store(sums_ptr + 3, tl.sum(odds * odds * own_bend, axis=0))
            tl.store(sums_ptr + 4, tl.sum(odds * own_bend, axis=0))
            tl.store(sums_ptr + 5, tl.sum(own_bend, axis=0))
            sums_ptr += NUM_SUMS


def tally_candidates(
    slots: torch.Tensor,  # [num_rows] int, batch row -> request slot
    merged_token_ids: torch.Tensor,  # [max_num_reqs, max_num_merged] int32
    merged_parents: torch.Tensor,  # [max_num_reqs, max_num_merged] int32, -1: root
    proposers: torch.Tensor,  # [max_num_reqs, max_num_merged] int32, bit per proposer
    own_scores: torch.Tensor,  # [num_proposers, max_num_reqs, max_num_merged] float32
    num_merged: torch.Tensor,  # [max_num_reqs] int32
    sibling_bits: torch.Tensor,  # [max_num_reqs, max_num_merged] int32, bit per
    # proposer of any child of a node's parent
    slopes: torch.Tensor,  # [num_proposers * NUM_COMPANIES] float32
    offsets: torch.Tensor,  # as slopes
    token_ids: torch.Tensor,  # [max_num_reqs, max_num_tokens] int, a slot's whole text
    num_tokens: torch.Tensor,  # [max_num_reqs] int, of the text, stale columns past it
    num_emitted: torch.Tensor,  # [num_rows] int, of them the newest, said after the root
    sums: torch.Tensor,  # out [num_rows, num_voices, NUM_SUMS] float32
) -> None:
    """Sum up, per row and voice, how wrong the voice was: for ``learn_mixture``.

    A child counts where the path to its parent is how the emitted tokens begin, and
    they go on; it is right if they go on to it. The rate that it had is found again from
    ``slopes`` and ``offsets``, which must be those of ``rate_candidates``. Scores that
    are no finite number count for nobody. Parents precede children.
    """
    num_proposers, *shape = own_scores.shape
    merged = (
        merged_token_ids,
        merged_parents,
        proposers,
        own_scores[0],
        sibling_bits,
    )
    num_voices = num_proposers * bins.NUM_COMPANIES
    if len({(t.shape, t.stride()) for t in merged}) > 1:
        raise ValueError("the merged tensors must have one shape and one stride")
    for name, tensor, expected in (
        ("slopes", slopes, (num_voices,)),
        ("offsets", offsets, (num_voices,)),
        ("sums", sums, (slots.shape[0], num_voices, mixing.NUM_SUMS)),
    ):
        if tensor.shape != expected or not tensor.is_contiguous():
            raise ValueError(
                f"{name} {tuple(tensor.shape)}, expected contiguous {expected}"
            )
    if num_emitted.shape[0] < slots.shape[0]:
        raise ValueError(f"num_emitted is shorter than {slots.shape[0]} rows")
    if num_merged.shape[0] < shape[0]:
        raise ValueError(f"num_merged must have {shape[0]} slots")
    if num_tokens.shape[0] < token_ids.shape[0]:
        raise ValueError(f"{num_tokens.shape[0]} lengths of {token_ids.shape[0]} texts")
    vectors = (slots, num_merged, num_tokens, num_emitted)
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
        sibling_bits,
        slopes,
        offsets,
        token_ids,
        token_ids.stride(0),
        num_tokens,
        num_emitted,
        sums,
        sums.stride(0),
        num_proposers,
        BLOCK_NODES=max(triton.next_power_of_2(shape[1]), MIN_BLOCK),
        num_warps=1,  # gathers and reductions: within a warp they need no barrier
    )
