import torch

from vllm_treespec.kernels.bins import (
    BIN_WIDTH,
    NUM_BINS,
    NUM_COMPANIES,
    SLOPE,
)


def company_rows(
    bits: torch.Tensor,  # [num_rows, num_nodes] int32, bit per proposer of a node
    proposer: int,
    offering: torch.Tensor,  # [num_rows] int32, bit per proposer that offered anything
) -> torch.Tensor:  # [num_rows, num_nodes] int64
    """The calibration's row of each node, for this proposer in the node's company."""
    others = ~(1 << proposer)
    others_offer = (offering & others != 0).long()[:, None]
    return proposer * NUM_COMPANIES + torch.where(bits & others != 0, 2, others_offer)


def bins_of(scores: torch.Tensor) -> torch.Tensor:
    """int64, the last for what is no number."""
    bins = (-scores / BIN_WIDTH).nan_to_num(nan=NUM_BINS, posinf=NUM_BINS)
    return bins.clamp(0, NUM_BINS - 1).long()


def calibrated(
    scores: torch.Tensor,  # [...] float32
    first_bins: torch.Tensor,  # int64, broadcast with scores: where a row of knots begins
    knots: torch.Tensor,  # [num_rows, NUM_BINS] float32, at the bins' centres
) -> torch.Tensor:  # [...] float32
    """What scores are worth: between the knots of a row, beyond them by the score
    itself."""
    places = (scores / -BIN_WIDTH - 0.5).nan_to_num(nan=NUM_BINS, posinf=NUM_BINS)
    places = places.clamp(0, NUM_BINS - 1)
    below = places.long()
    above = (below + 1).clamp(max=NUM_BINS - 1)
    knots = knots.view(-1)
    between = torch.lerp(
        knots[first_bins + below], knots[first_bins + above], places - below
    )
    beyond = (scores + BIN_WIDTH * (NUM_BINS - 0.5)).clamp(max=0.0)
    return between + SLOPE * scores + beyond
