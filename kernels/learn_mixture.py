"""What a step taught corrects the voices."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels import mixing
from vllm_treespec.kernels.mixing import NUM_REMEMBERED

NUM_SUMS = tl.constexpr(mixing.NUM_SUMS)
MEMORY = tl.constexpr(mixing.MEMORY)
PRIOR_CURVATURE = tl.constexpr(mixing.PRIOR_CURVATURE)
MAX_CHANGE = tl.constexpr(mixing.MAX_CHANGE)
BLOCK_ROWS = 64


@triton.jit
def _sum_rows(sums_ptr, row_stride, num_rows, BLOCK_ROWS: tl.constexpr):
    """Always in the same order: ranks that decode together must agree."""
    partial = tl.full([BLOCK_ROWS], 0.0, tl.float32)
    for first_row in range(0, num_rows, BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        partial += tl.load(
            sums_ptr + rows * row_stride, mask=rows < num_rows, other=0.0
        )
    return tl.sum(partial, axis=0)


@triton.jit(do_not_specialize=["num_rows"])
def _learn_mixture_kernel(
    sums_ptr,
    sums_row_stride,
    slopes_ptr,
    offsets_ptr,
    memory_ptr,
    memory_stride,
    num_rows,
    BLOCK_ROWS: tl.constexpr,
):
    voice = tl.program_id(0)
    sums_ptr += voice * NUM_SUMS
    memory_ptr += voice * memory_stride
    known = _sum_rows(sums_ptr, sums_row_stride, num_rows, BLOCK_ROWS)
    slope_error = _sum_rows(sums_ptr + 1, sums_row_stride, num_rows, BLOCK_ROWS)
    offset_error = _sum_rows(sums_ptr + 2, sums_row_stride, num_rows, BLOCK_ROWS)
    slope_bend = _sum_rows(sums_ptr + 3, sums_row_stride, num_rows, BLOCK_ROWS)
    both_bend = _sum_rows(sums_ptr + 4, sums_row_stride, num_rows, BLOCK_ROWS)
    offset_bend = _sum_rows(sums_ptr + 5, sums_row_stride, num_rows, BLOCK_ROWS)

    known += tl.load(memory_ptr)
    fading = MEMORY / tl.maximum(known, MEMORY)
    slope_bend = fading * (slope_bend + tl.load(memory_ptr + 1))
    both_bend = fading * (both_bend + tl.load(memory_ptr + 2))
    offset_bend = fading * (offset_bend + tl.load(memory_ptr + 3))
    slope = tl.load(slopes_ptr + voice)
    offset = tl.load(offsets_ptr + voice)
    # One warp may not store what another is yet to load.
    tl.debug_barrier()
    tl.store(memory_ptr, fading * known)
    tl.store(memory_ptr + 1, slope_bend)
    tl.store(memory_ptr + 2, both_bend)
    tl.store(memory_ptr + 3, offset_bend)

    slope_bend += PRIOR_CURVATURE
    offset_bend += PRIOR_CURVATURE
    determinant = slope_bend * offset_bend - both_bend * both_bend
    slope_step = (offset_bend * slope_error - both_bend * offset_error) / determinant
    # no voice is heard as the opposite of what it says
    change = tl.minimum(tl.maximum(-slope_step, -MAX_CHANGE), MAX_CHANGE)
    change = tl.maximum(change, -slope)
    tl.store(slopes_ptr + voice, slope + change)
    # the best offset for what the slope has become
    step = (offset_error + both_bend * change) / offset_bend
    step = tl.minimum(tl.maximum(step, -MAX_CHANGE), MAX_CHANGE)
    tl.store(offsets_ptr + voice, offset - step)


def learn_mixture(
    sums: torch.Tensor,  # [num_rows, num_voices, NUM_SUMS] float32
    slopes: torch.Tensor,  # [num_voices] float32, updated, never negative
    offsets: torch.Tensor,  # [num_voices] float32, updated
    memory: torch.Tensor,  # [num_voices, NUM_REMEMBERED] float32, updated
) -> None:
    """Correct every voice by one Newton step of its logistic regression.

    The step is taken from this step's errors, against the curvature of all that is
    remembered. The sums are those of ``tally_candidates``.
    """
    num_rows, num_voices = sums.shape[:2]
    for name, tensor, shape in (
        ("sums", sums, (num_rows, num_voices, mixing.NUM_SUMS)),
        ("slopes", slopes, (num_voices,)),
        ("offsets", offsets, (num_voices,)),
        ("memory", memory, (num_voices, NUM_REMEMBERED)),
    ):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} {tuple(tensor.shape)}, expected contiguous {shape}"
            )
    _learn_mixture_kernel[(num_voices,)](
        sums,
        sums.stride(0),
        slopes,
        offsets,
        memory,
        memory.stride(0),
        num_rows,
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=1,
    )
