"""Calibrate: what is a proposer's score worth?

Proposers score their candidates in their own ways: a draft model is too sure of itself,
an n-gram too modest. What counts is how often the target went the way of a candidate
that this proposer scored so. Rates are measured per bin of the score, made monotone
(isotonic regression, so that no child overtakes its parent), and replace the scores
when trees are merged. (Calibration by binning: Zadrozny and Elkan, 2002.)
"""

from __future__ import annotations

import torch

from vllm_treespec.kernels.bins import BIN_WIDTH, NUM_BINS
from vllm_treespec.kernels.reference.calibration import bins_of, calibrated

PRIOR_WEIGHT = 16.0  # candidates for which the proposer is taken at its word
MEMORY = 4096.0  # candidates per bin that are remembered, older ones fade
REFIT_EVERY = 16  # steps between two fits


class Calibration:
    """Measured acceptance of every proposer's scores.

    The builder's kernels count into ``right`` and ``known`` and read ``knots``;
    ``observe`` and ``apply`` do the same on tensors.
    """

    def __init__(self, num_proposers: int, device: torch.device) -> None:
        shape = (num_proposers, NUM_BINS)
        self.right = torch.zeros(shape, device=device)
        self.known = torch.zeros(shape, device=device)
        self._centres = -BIN_WIDTH * (torch.arange(NUM_BINS, device=device) + 0.5)
        first_bins = torch.arange(num_proposers, device=device) * NUM_BINS
        self._first_bins = first_bins[:, None, None]
        self.knots = self._centres.repeat(num_proposers, 1)  # log-probabilities
        self._num_steps = 0

    def observe(
        self,
        scores: torch.Tensor,  # [num_proposers, num_rows, num_candidates] float32
        labels: torch.Tensor,  # as scores, int8: 1 right, 0 wrong, -1 unknown
    ) -> None:
        """Count candidates whose fate is known, and end a step."""
        places = (bins_of(scores) + self._first_bins).view(-1)
        for counts, counted in ((self.right, labels == 1), (self.known, labels >= 0)):
            counts.view(-1).index_add_(0, places, counted.float().view(-1))
        self.end_step()

    def end_step(self) -> None:
        """Fit the knots anew every so many steps."""
        self._num_steps += 1
        if self._num_steps % REFIT_EVERY == 0:
            fading = MEMORY / self.known.clamp(min=MEMORY)
            self.right *= fading
            self.known *= fading
            self.knots.copy_(self._fit())

    def apply(
        self,
        scores: torch.Tensor,  # [num_proposers, num_rows, num_candidates] float32
    ) -> torch.Tensor:
        """Log-probability that the target goes each candidate's way, same shape.

        Monotone in the score, proposer by proposer.
        """
        return calibrated(scores, self._first_bins, self.knots)

    def _fit(self) -> torch.Tensor:
        """``[num_proposers, num_bins]`` log-rates that never rise with the bin.

        Isotonic regression by its min-max formula: every bin takes the least, over
        where a block may start, of the greatest mean over where it may end.
        """
        weights = self.known + PRIOR_WEIGHT
        sums = self.right + PRIOR_WEIGHT * self._centres.exp()
        weight_to = torch.nn.functional.pad(weights.cumsum(1), (1, 0))
        sum_to = torch.nn.functional.pad(sums.cumsum(1), (1, 0))
        # [proposer, start, end] mean over bins start..end
        mean = (sum_to[:, None, 1:] - sum_to[:, :-1, None]) / (
            weight_to[:, None, 1:] - weight_to[:, :-1, None]
        ).clamp(min=1.0)
        block = torch.ones(NUM_BINS, NUM_BINS, device=mean.device, dtype=torch.bool)
        mean = mean.masked_fill(~block.triu(), -torch.inf)
        greatest = mean.flip(2).cummax(2).values.flip(2)  # over ends at or after a bin
        greatest = greatest.masked_fill(~block.triu(), torch.inf)
        return greatest.amin(1).clamp(min=1e-9).log()
