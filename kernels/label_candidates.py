"""Which guesses of the last step the target went along with."""

import torch
import triton
import triton.language as tl

MIN_BLOCK = 32


@triton.jit
def _label_candidates_kernel(
    token_ids_ptr,
    token_ids_proposer_stride,
    token_ids_row_stride,
    parents_ptr,
    parents_proposer_stride,
    parents_row_stride,
    num_candidates_ptr,
    num_candidates_stride,
    emitted_ptr,
    emitted_stride,
    num_emitted_ptr,
    labels_ptr,
    labels_proposer_stride,
    labels_row_stride,
    max_num_candidates,
    BLOCK_CANDIDATES: tl.constexpr,
):
    proposer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    token_ids_ptr += proposer * token_ids_proposer_stride + row * token_ids_row_stride
    parents_ptr += proposer * parents_proposer_stride + row * parents_row_stride
    labels_ptr += proposer * labels_proposer_stride + row * labels_row_stride
    num_candidates = tl.load(
        num_candidates_ptr + proposer * num_candidates_stride + row
    )
    num_emitted = tl.load(num_emitted_ptr + row)
    candidates = tl.arange(0, BLOCK_CANDIDATES)
    is_candidate = candidates < num_candidates
    parents = tl.load(parents_ptr + candidates, mask=is_candidate, other=-1)
    token_ids = tl.load(token_ids_ptr + candidates, mask=is_candidate, other=0)

    # Every candidate adds up what lies below an ancestor, and takes that ancestor's
    # ancestor next: each round skips twice as many levels as the one before.
    depths = tl.full([BLOCK_CANDIDATES], 1, tl.int32)
    ancestors = parents
    while tl.max(ancestors, axis=0) >= 0:
        is_real = ancestors >= 0
        sources = tl.maximum(ancestors, 0)
        depths += tl.where(is_real, tl.gather(depths, sources, axis=0), 0)
        ancestors = tl.where(is_real, tl.gather(ancestors, sources, axis=0), -1)

    is_known = depths <= num_emitted
    emitted_ptr += row * emitted_stride
    emitted = tl.load(emitted_ptr + depths - 1, mask=is_candidate & is_known, other=0)
    # what is not known yet contradicts nothing
    agrees = tl.where(is_known, (token_ids == emitted).to(tl.int32), 1)
    ancestors = parents
    while tl.max(ancestors, axis=0) >= 0:
        is_real = ancestors >= 0
        sources = tl.maximum(ancestors, 0)
        agrees &= tl.where(is_real, tl.gather(agrees, sources, axis=0), 1)
        ancestors = tl.where(is_real, tl.gather(ancestors, sources, axis=0), -1)

    labels = tl.where(is_candidate & (is_known | (agrees == 0)), agrees, -1)
    in_row = candidates < max_num_candidates
    tl.store(labels_ptr + candidates, labels.to(tl.int8), mask=in_row)


def label_candidates(
    token_ids: torch.Tensor,  # [num_proposers, num_rows, max_num_candidates] int32
    parents: torch.Tensor,  # [num_proposers, num_rows, max_num_candidates] int32, -1: root
    num_candidates: torch.Tensor,  # [num_proposers, num_rows] int32
    emitted: torch.Tensor,  # [>= num_rows, max_num_emitted] int, stale past num_emitted
    num_emitted: torch.Tensor,  # [>= num_rows] int32, 0: nothing is known of this row
    labels: torch.Tensor,  # out [num_proposers, num_rows, max_num_candidates] int8
) -> None:
    """Say of every candidate whether the target went its way.

    ``emitted`` is what the target said after the root. A candidate's label is 1 if its
    path, from the root to itself, is how that begins; 0 if some token differs; -1 if
    none does but the path is longer than what was said. Parents precede children.
    Columns past ``num_candidates`` are not read and get -1.
    """
    num_proposers, num_rows, max_num_candidates = token_ids.shape
    if not token_ids.shape == parents.shape == labels.shape or (
        num_candidates.shape != (num_proposers, num_rows)
    ):
        raise ValueError(
            f"parents {tuple(parents.shape)}, labels {tuple(labels.shape)} and "
            f"num_candidates {tuple(num_candidates.shape)} must go with token_ids "
            f"{tuple(token_ids.shape)}"
        )
    if min(emitted.shape[0], num_emitted.shape[0]) < num_rows:
        raise ValueError(f"emitted and num_emitted are shorter than {num_rows} rows")
    tensors = (token_ids, parents, num_candidates, emitted, num_emitted, labels)
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in tensors):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _label_candidates_kernel[(num_proposers, num_rows)](
        token_ids,
        *token_ids.stride()[:2],
        parents,
        *parents.stride()[:2],
        num_candidates,
        num_candidates.stride(0),
        emitted,
        emitted.stride(0),
        num_emitted,
        labels,
        *labels.stride()[:2],
        max_num_candidates,
        BLOCK_CANDIDATES=max(triton.next_power_of_2(max_num_candidates), MIN_BLOCK),
        num_warps=1,  # gathers and reductions: within a warp they need no barrier
    )
