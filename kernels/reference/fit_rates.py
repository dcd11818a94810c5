import torch

from vllm_treespec.kernels.recycling import (
    LEAST_RATE,
    MEMORY,
    NUM_BINS,
    PRIOR_WEIGHT,
)
from vllm_treespec.kernels.reference.successors import bin_centres


def fit_rates(right: torch.Tensor, known: torch.Tensor, knots: torch.Tensor) -> None:
    fading = MEMORY / known.clamp(min=MEMORY)
    right *= fading
    known *= fading
    weights = known + PRIOR_WEIGHT
    sums = right + PRIOR_WEIGHT * bin_centres(known.device).exp()
    weight_to = torch.nn.functional.pad(weights.cumsum(1), (1, 0))
    sum_to = torch.nn.functional.pad(sums.cumsum(1), (1, 0))
    # [kind, start, end] mean over bins start..end
    mean = (sum_to[:, None, 1:] - sum_to[:, :-1, None]) / (
        weight_to[:, None, 1:] - weight_to[:, :-1, None]
    ).clamp(min=1.0)
    block = torch.ones(NUM_BINS, NUM_BINS, device=mean.device, dtype=torch.bool)
    mean = mean.masked_fill(~block.triu(), -torch.inf)
    greatest = mean.flip(2).cummax(2).values.flip(2)  # over ends at or after a bin
    greatest = greatest.masked_fill(~block.triu(), torch.inf)
    knots.copy_(greatest.amin(1).clamp(min=LEAST_RATE).log())
