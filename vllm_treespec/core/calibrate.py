"""Calibrate: what is a proposer's score worth?

Proposers score their candidates in their own ways: a draft model is too sure of itself,
an n-gram too modest. What counts is how often the target went the way of a candidate
that this proposer scored so. Rates are measured per bin of the score, made monotone
(isotonic regression, so that no child overtakes its parent), and replace the scores.
(Calibration by binning: Zadrozny and Elkan, 2002.)
"""

from __future__ import annotations

import torch

BIN_WIDTH = 0.25  # nats
NUM_BINS = 48  # down to a log-probability of -12
# Keeps candidates of a flat stretch in their proposer's order.
SLOPE = 1e-3
PRIOR_WEIGHT = 16.0  # candidates for which the proposer is taken at its word
MEMORY = 4096.0  # candidates per bin that are remembered, older ones fade
REFIT_EVERY = 16  # steps between two fits


class Calibration:
    """Measured acceptance of every proposer's scores."""

    def __init__(self, num_proposers: int, device: torch.device) -> None:
        shape = (num_proposers, NUM_BINS)
        self._right = torch.zeros(shape, device=device)
        self._known = torch.zeros(shape, device=device)
        self._centres = -BIN_WIDTH * (torch.arange(NUM_BINS, device=device) + 0.5)
        first_bins = torch.arange(num_proposers, device=device) * NUM_BINS
        self._first_bins = first_bins[:, None, None]
        self._knots = self._centres.repeat(num_proposers, 1)  # log-probabilities
        self._num_steps = 0

    def observe(
        self,
        scores: torch.Tensor,  # [num_proposers, num_rows, num_candidates] float32
        labels: torch.Tensor,  # as scores, int8: 1 right, 0 wrong, -1 unknown
    ) -> None:
        """Count candidates whose fate is known; fit the knots every so many steps."""
        bins = (-scores / BIN_WIDTH).nan_to_num(nan=NUM_BINS, posinf=NUM_BINS)
        bins = bins.clamp(0, NUM_BINS - 1).long() + self._first_bins
        for counts, counted in ((self._right, labels == 1), (self._known, labels >= 0)):
            counts.view(-1).index_add_(0, bins.view(-1), counted.float().view(-1))
        self._num_steps += 1
        if self._num_steps % REFIT_EVERY == 0:
            fading = MEMORY / self._known.clamp(min=MEMORY)
            self._right *= fading
            self._known *= fading
            self._knots.copy_(self._fit())

    def apply(
        self,
        scores: torch.Tensor,  # [num_proposers, num_rows, num_candidates] float32
    ) -> torch.Tensor:
        """Log-probability that the target goes each candidate's way, same shape.

        Monotone in the score, proposer by proposer.
        """
        places = (scores / -BIN_WIDTH - 0.5).nan_to_num(nan=NUM_BINS, posinf=NUM_BINS)
        places = places.clamp(0, NUM_BINS - 1)
        below = places.long()
        above = (below + 1).clamp(max=NUM_BINS - 1)
        knots = self._knots.view(-1)
        values = torch.lerp(
            knots[self._first_bins + below],
            knots[self._first_bins + above],
            places - below,
        )
        # Beyond the last bin the proposer's own slope goes on.
        beyond = (scores - self._centres[-1]).clamp(max=0.0)
        return values + SLOPE * scores + beyond

    def _fit(self) -> torch.Tensor:
        """``[num_proposers, num_bins]`` log-rates that never rise with the bin.

        Isotonic regression by its min-max formula: every bin takes the least, over
        where a block may start, of the greatest mean over where it may end.
        """
        weights = self._known + PRIOR_WEIGHT
        sums = self._right + PRIOR_WEIGHT * self._centres.exp()
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
