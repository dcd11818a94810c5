"""Counts of what was right become rates that rise with the weight."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels import recycling
from vllm_treespec.kernels.successors import BIN_WIDTH, NUM_BINS

PRIOR_WEIGHT = tl.constexpr(recycling.PRIOR_WEIGHT)
MEMORY = tl.constexpr(recycling.MEMORY)
LEAST_RATE = tl.constexpr(recycling.LEAST_RATE)


@triton.jit
def _fit_rates_kernel(right_ptr, known_ptr, knots_ptr, BLOCK_BINS: tl.constexpr):
    kind = tl.program_id(0)
    bins = tl.arange(0, BLOCK_BINS)
    is_bin = bins < NUM_BINS
    places = kind * NUM_BINS + bins
    right = tl.load(right_ptr + places, mask=is_bin, other=0.0)
    known = tl.load(known_ptr + places, mask=is_bin, other=0.0)
    fading = MEMORY / tl.maximum(known, MEMORY)
    right *= fading
    known *= fading
    tl.store(right_ptr + places, right, mask=is_bin)
    tl.store(known_ptr + places, known, mask=is_bin)
    weights = tl.where(is_bin, known + PRIOR_WEIGHT, 0.0)
    centres = tl.exp(-BIN_WIDTH * (bins.to(tl.float32) + 0.5))
    sums = tl.where(is_bin, right + PRIOR_WEIGHT * centres, 0.0)

    # isotonic regression by its min-max formula: every bin takes the least, over where a
    # block may start, of the greatest mean over where it may end
    is_to = bins[:, None] <= bins[None, :]
    weight_to = tl.sum(tl.where(is_to, weights[:, None], 0.0), axis=0)  # by end
    sum_to = tl.sum(tl.where(is_to, sums[:, None], 0.0), axis=0)
    is_before = bins[:, None] > bins[None, :]
    weight_from = tl.sum(tl.where(is_before, weights[None, :], 0.0), axis=1)  # by start
    sum_from = tl.sum(tl.where(is_before, sums[None, :], 0.0), axis=1)
    spans = weight_to[None, :] - weight_from[:, None]
    means = (sum_to[None, :] - sum_from[:, None]) / tl.maximum(spans, 1.0)
    is_span = is_to & is_bin[None, :] & is_bin[:, None]
    means = tl.where(is_span, means, float("-inf"))
    for last in range(0, NUM_BINS):
        ends = tl.where(bins[None, :] >= last, means, float("-inf"))
        greatest = tl.max(ends, axis=1)
        starts = tl.where(bins <= last, greatest, float("inf"))
        rate = tl.maximum(tl.min(starts, axis=0), LEAST_RATE)
        tl.store(knots_ptr + kind * NUM_BINS + last, tl.log(rate))


def fit_rates(
    right: torch.Tensor,  # [2, NUM_BINS] float32, faded
    known: torch.Tensor,  # [2, NUM_BINS] float32, faded
    knots: torch.Tensor,  # out [2, NUM_BINS] float32, log-rates that never rise
) -> None:
    """Fit how often a weight of each bin is right, and forget what is long ago."""
    for name, tensor in (("right", right), ("known", known), ("knots", knots)):
        if tensor.shape[1] != recycling.NUM_BINS or not tensor.is_contiguous():
            raise ValueError(
                f"{name} {tuple(tensor.shape)}, expected contiguous rows of "
                f"{recycling.NUM_BINS}"
            )
    _fit_rates_kernel[(known.shape[0],)](
        right, known, knots, BLOCK_BINS=triton.next_power_of_2(recycling.NUM_BINS)
    )
