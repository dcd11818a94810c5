"""When a draft should stop growing, by how much of what it grew was accepted.

Draft & Verify (arXiv:2309.08168) drafts until its confidence falls below a threshold,
which rises while less than a wanted share of the drafted tokens is accepted, and falls
otherwise. On a tree, a draft's confidence in a level is the probability, by its own
account, that the target's path leads through one of the level's rows.
"""

from __future__ import annotations

import torch

# The paper's published code: https://github.com/dilab-zju/self-speculative-decoding
RATE_MEMORY = 0.5
THRESHOLD_MEMORY = 0.9
STEP = 0.01
# Of the levels that are drafted beyond the first. The paper wants 0.9 of a chain.
WANTED_RATE = 0.8
HIGHEST = 0.95


class EarlyStop:
    """A threshold that learns; all of it stays on the device."""

    def __init__(self, device: torch.device) -> None:
        self.threshold = torch.full((), 0.5, device=device)
        self._rate = torch.full((), WANTED_RATE, device=device)

    def learn(
        self,
        accepted: torch.Tensor,  # [num_reqs] int64, levels that the target went along
        drafted: torch.Tensor,  # [num_reqs] int64, levels of its tree, 0: not drafted
    ) -> None:
        """Move the threshold by a step's trees. The first level costs nothing more than
        looking at the newest token, so it does not count."""
        deeper = (drafted - 1).clamp(min=0)
        total = deeper.sum()
        share = torch.minimum((accepted - 1).clamp(min=0), deeper).sum() / total.clamp(
            min=1
        )
        is_known = total > 0
        rate = RATE_MEMORY * self._rate + (1 - RATE_MEMORY) * share
        self._rate.copy_(torch.where(is_known, rate, self._rate))
        step = torch.where(self._rate < WANTED_RATE, STEP, -STEP)
        moved = self.threshold + (1 - THRESHOLD_MEMORY) * step
        self.threshold.copy_(
            torch.where(is_known, moved, self.threshold).clamp(0.0, HIGHEST)
        )
