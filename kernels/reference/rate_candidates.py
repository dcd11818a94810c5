import torch

from vllm_treespec.kernels.bins import NUM_BINS
from vllm_treespec.kernels.reference.calibration import calibrated, company_rows


def rate_candidates(
    slots: torch.Tensor,
    proposers: torch.Tensor,
    own_scores: torch.Tensor,
    num_merged: torch.Tensor,
    offering: torch.Tensor,
    knots: torch.Tensor,
    is_drawn: torch.Tensor | None,
    scores: torch.Tensor,
) -> None:
    slots = slots.long()
    columns = torch.arange(proposers.shape[1], device=slots.device)
    is_node = columns < num_merged[slots, None]
    bits, own = proposers[slots], own_scores[:, slots]
    if is_drawn is not None:
        draws = is_drawn[: len(slots), None] & is_node
        own[0].masked_fill_(draws, -torch.inf)
        own_scores[0, slots] = own[0]

    total = torch.zeros_like(own[0])
    count = torch.zeros_like(own[0])
    for proposer, each in enumerate(own):
        first_bins = company_rows(bits, proposer, offering[slots]) * NUM_BINS
        is_scored = each.isfinite()
        total += torch.where(is_scored, calibrated(each, first_bins, knots), 0.0)
        count += is_scored
    rated = torch.where(count > 0, total / count, -torch.inf)
    if is_drawn is not None:
        rated.masked_fill_(draws & (bits & 1 > 0), 0.0)
    scores[slots] = torch.where(is_node, rated, scores[slots])
