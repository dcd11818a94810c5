"""What ``rate_candidates`` and ``tally_candidates`` make of a score."""

import triton
import triton.language as tl

from vllm_treespec.kernels import bins

BIN_WIDTH = tl.constexpr(bins.BIN_WIDTH)
NUM_BINS = tl.constexpr(bins.NUM_BINS)
NUM_COMPANIES = tl.constexpr(bins.NUM_COMPANIES)
SLOPE = tl.constexpr(bins.SLOPE)


@triton.jit
def is_finite(scores):
    return tl.abs(scores) < float("inf")  # false for NaN


@triton.jit
def company_rows(bits, proposer, offering):
    """The calibration's row of each node, for this proposer in the node's company."""
    others = ~(1 << proposer)
    others_offer = ((offering & others) != 0).to(tl.int32)
    companies = tl.where((bits & others) != 0, 2, others_offer)
    return proposer * NUM_COMPANIES + companies


@triton.jit
def bin_places(scores, rows):
    """Where a row's bin of each finite score lies."""
    bins = tl.minimum(tl.maximum(scores / -BIN_WIDTH, 0.0), NUM_BINS - 1.0)
    return rows * NUM_BINS + bins.to(tl.int32)


@triton.jit
def calibrated(scores, rows, knots_ptr, mask):
    """What finite scores are worth: between the knots of a row, beyond them by the
    score itself."""
    places = tl.minimum(tl.maximum(scores / -BIN_WIDTH - 0.5, 0.0), NUM_BINS - 1.0)
    below = places.to(tl.int32)
    above = tl.minimum(below + 1, NUM_BINS - 1)
    low = tl.load(knots_ptr + rows * NUM_BINS + below, mask=mask, other=0.0)
    high = tl.load(knots_ptr + rows * NUM_BINS + above, mask=mask, other=0.0)
    between = low + (places - below) * (high - low)
    beyond = tl.minimum(scores + BIN_WIDTH * (NUM_BINS - 0.5), 0.0)
    return between + SLOPE * scores + beyond
