"""Where the successors of a context are, and how likely one of a weight is right."""

import triton
import triton.language as tl

from vllm_treespec.kernels import recycling

NONE = tl.constexpr(recycling.NONE)
MIX_BEFORE = tl.constexpr(recycling.MIX_BEFORE)
MIX_TOKEN = tl.constexpr(recycling.MIX_TOKEN)
LEAST_WEIGHT = tl.constexpr(recycling.LEAST_WEIGHT)
BIN_WIDTH = tl.constexpr(recycling.BIN_WIDTH)
NUM_BINS = tl.constexpr(recycling.NUM_BINS)
SLOPE = tl.constexpr(recycling.SLOPE)
LAST_CENTRE = tl.constexpr(-recycling.BIN_WIDTH * (recycling.NUM_BINS - 0.5))


@triton.jit
def is_of(token_ids, vocab_size):
    return (token_ids >= 0) & (token_ids < vocab_size)


@triton.jit
def rows_of(before, token_ids, vocab_size, num_rows):
    """The token's row and the pair's, the last row for none; int64 contexts."""
    nobody = num_rows - 1
    is_token = is_of(token_ids, vocab_size)
    is_pair = is_token & is_of(before, vocab_size)
    mixed = tl.where(is_pair, before, 0) * MIX_BEFORE
    mixed += tl.where(is_pair, token_ids, 0) * MIX_TOKEN
    pair = vocab_size + (mixed ^ (mixed >> 16)) % (nobody - vocab_size)
    return tl.where(is_token, token_ids, nobody), tl.where(is_pair, pair, nobody)


@triton.jit
def owner_of_pair(before, token_ids, vocab_size):
    return (before + 1) * vocab_size + token_ids


@triton.jit
def look_up(before, token_ids, vocab_size, num_rows, owners_ptr):
    """The context's row, its token's where the pair is not known, and which it is."""
    token_row, pair_row = rows_of(before, token_ids, vocab_size, num_rows)
    owner = tl.load(owners_ptr + pair_row)
    is_pair = owner == owner_of_pair(before, token_ids, vocab_size)
    return tl.where(is_pair, pair_row, token_row), is_pair


@triton.jit
def log_weights(weights):
    return tl.log(tl.maximum(weights, LEAST_WEIGHT))


@triton.jit
def log_rates(scores, knots_ptr):
    """How often a successor of this log-weight is right: between two bins' centres."""
    places = tl.maximum(scores / (-BIN_WIDTH) - 0.5, 0.0)
    places = tl.minimum(places, NUM_BINS - 1.0)
    below = places.to(tl.int32)
    above = tl.minimum(below + 1, NUM_BINS - 1)
    first, second = tl.load(knots_ptr + below), tl.load(knots_ptr + above)
    values = first + (places - below.to(tl.float32)) * (second - first)
    # beyond the last bin the weight's own slope goes on
    return values + SLOPE * scores + tl.minimum(scores - LAST_CENTRE, 0.0)
