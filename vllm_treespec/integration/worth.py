"""Measures what proposers are worth, and asks only those that pay for their time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_treespec.core.roster import WINDOW, Roster
from vllm_treespec.integration.stopwatch import Stopwatch

if TYPE_CHECKING:
    from vllm_treespec.core.observe import StepCounts


class Worth:
    """The roster, fed with this engine's acceptance and times.

    A window's counts are copied to the host at its end and looked at one window later,
    so no step waits for them.
    """

    def __init__(
        self,
        num_proposers: int,
        max_num_reqs: int,
        *,
        adaptive: bool,
        ranks: Any,
        device: torch.device,
    ) -> None:
        self._roster = Roster(num_proposers)
        self._adaptive = adaptive
        self._ranks = ranks
        self.stopwatch = Stopwatch(num_proposers, device)
        # Emitted tokens, then each proposer's marginal ones: one row of them.
        self._counts = torch.zeros(
            1, 1 + num_proposers, dtype=torch.int64, device=device
        )
        self._row = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self._copied = torch.zeros_like(
            self._counts, device="cpu", pin_memory=device.type != "cpu"
        )
        self._times: tuple[list[float], float] | None = None
        self._num_steps = 0

    @property
    def drafting(self) -> list[bool]:
        """Per proposer, whether it drafts this step."""
        return self._roster.drafting

    def observe(self, counts: StepCounts) -> None:
        """Add a step's."""
        added = counts.emitted_and_exclusive
        self._counts.index_add_(0, self._row[: added.shape[0]], added)

    def end_step(self) -> None:
        """Decide anew who drafts, if a window is over."""
        self._num_steps += 1
        if self._num_steps % WINDOW:
            return
        if self._adaptive and self._times is not None:
            num_emitted, *gains = self._copied[0].tolist()
            seconds, total_seconds = self._times
            self._roster.judge(
                num_emitted=num_emitted,
                gains=gains,
                seconds=seconds,
                total_seconds=total_seconds,
            )
            if self._ranks.world_size > 1:
                # Clocks differ, but all ranks must run the same models.
                self._roster.drafting = self._ranks.broadcast_object(
                    self._roster.drafting, src=0
                )
        self._copied.copy_(self._counts, non_blocking=True)
        self._counts.zero_()
        self._times = self.stopwatch.read()
