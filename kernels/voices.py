"""What ``rate_candidates`` and ``tally_candidates`` make of a score."""

import triton
import triton.language as tl

from vllm_treespec.kernels import bins, mixing

NUM_COMPANIES = tl.constexpr(bins.NUM_COMPANIES)
MAX_LOG_ODDS = tl.constexpr(mixing.MAX_LOG_ODDS)


@triton.jit
def of_parents(values, parents, at_root):
    """Of every node's parent; ``at_root`` where that is the root."""
    found = tl.gather(values, tl.maximum(parents, 0), axis=0)
    return tl.where(parents >= 0, found, at_root)


@triton.jit
def log_odds(log_probs):
    """Finite, of log-probabilities at most 0."""
    # 1 - exp(x) has few digits left where x is small
    series = -log_probs * (1.0 + log_probs * (0.5 + log_probs / 6.0))
    misses = tl.where(log_probs > -0.01, series, 1.0 - tl.exp(log_probs))
    odds = log_probs - tl.log(tl.maximum(misses, 1e-30))
    return tl.minimum(tl.maximum(odds, -MAX_LOG_ODDS), MAX_LOG_ODDS)


@triton.jit
def log_sigmoid(odds):
    rest = tl.exp(-tl.abs(odds))
    # 1 + rest has few digits left of a small rest
    series = rest * (1.0 - 0.5 * rest)
    return tl.minimum(odds, 0.0) - tl.where(rest < 1e-3, series, tl.log(1.0 + rest))


@triton.jit
def said_by(own_scores, parents, bits, sibling_bits, proposer):
    """A proposer's odds of each node, in which company, and whether it has a say."""
    own_scores = tl.where(tl.abs(own_scores) < float("inf"), own_scores, float("nan"))
    edges = own_scores - of_parents(own_scores, parents, 0.0)
    speaks = edges == edges
    others = ~(1 << proposer)
    others_offer = ((sibling_bits & others) != 0).to(tl.int32)
    companies = tl.where((bits & others) != 0, 2, others_offer)
    return log_odds(tl.where(speaks, tl.minimum(edges, 0.0), 0.0)), companies, speaks


@triton.jit
def mixed_odds(
    own_scores_ptr,
    own_scores_proposer_stride,
    is_node,
    parents,
    bits,
    sibling_bits,
    slopes_ptr,
    offsets_ptr,
    first_proposer,
    num_proposers,
):
    """The mean of the corrected odds, and how many proposers have a say."""
    sums = tl.zeros_like(parents).to(tl.float32)
    number = tl.zeros_like(parents).to(tl.float32)
    own_scores_ptr += first_proposer * own_scores_proposer_stride
    for proposer in range(first_proposer, num_proposers):
        own_scores = tl.load(own_scores_ptr, mask=is_node, other=float("-inf"))
        odds, companies, speaks = said_by(
            own_scores, parents, bits, sibling_bits, proposer
        )
        voices = proposer * NUM_COMPANIES + companies
        slopes = tl.load(slopes_ptr + voices, mask=speaks, other=0.0)
        offsets = tl.load(offsets_ptr + voices, mask=speaks, other=0.0)
        sums += slopes * odds + offsets
        number += speaks.to(tl.float32)
        own_scores_ptr += own_scores_proposer_stride
    return sums / tl.maximum(number, 1.0), number
