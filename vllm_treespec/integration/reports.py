"""What a worker counts in a step, as the increments of ``metrics.SERIES``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_treespec.integration.carrier import REPORT, Report
from vllm_treespec.integration.metrics import NO_DRAFT_REASONS

if TYPE_CHECKING:
    from vllm_treespec.core.observe import StepCounts
    from vllm_treespec.integration.metrics import Increments


@dataclass(slots=True)
class PendingReport:
    """A step's report, once its counts are on the host."""

    increments: Increments  # those known already
    counts: StepCounts | None  # on the host, None: no draft was scheduled
    num_scheduled: int  # drafts, of all requests
    decodes: npt.NDArray[np.bool_]  # [num_reqs], False: in its prefill
    reasons: npt.NDArray[np.int8]  # [num_reqs], why there would be no drafts
    rests: bool = False  # no proposer drafts for the time being

    def finish(self) -> Report:
        """The counts' copy must have arrived."""
        verified = np.zeros(len(self.decodes), np.int64)
        if self.counts is not None:
            verified = self.counts.verified.numpy()
            self._add_counts(self.counts)
        idle = self.reasons[self.decodes & (verified == 0)]
        self.increments["steps_without_drafts"] = np.bincount(
            idle, minlength=len(NO_DRAFT_REASONS)
        ).tolist()
        return Report(self.increments, verified.tolist(), self.rests)

    def _add_counts(self, counts: StepCounts) -> None:
        sizes = counts.verified[counts.verified > 0]
        num_nodes = int(sizes.sum())
        self.increments |= {
            "nodes_verified": [num_nodes],
            "padding_rows": [self.num_scheduled - num_nodes],
            "acceptance_length": (counts.lengths + 1)[counts.verified > 0].tolist(),
            "tree_size": sizes.tolist(),
            "accepted_by_rank": counts.by_rank.tolist(),
            "drafted_nodes": counts.drafted.tolist(),
            "accepted_nodes": counts.accepted.tolist(),
            "exclusively_accepted_nodes": counts.exclusive.tolist(),
        }


class Reporter:
    """Collects a step's report: ``verified`` if drafts were, ``decoded``, ``take``."""

    def __init__(self) -> None:
        self._counts: StepCounts | None = None
        self._pending: PendingReport | None = None
        self._totals: Increments = {}

    def verified(self, counts: StepCounts) -> None:
        """Start copying the counts; vLLM waits for the tokens that it copies later."""
        self._counts = counts.to_host()

    def decoded(self, input_batch: Any, reasons: npt.NDArray[np.int8]) -> None:
        self._pending = PendingReport(
            increments={},
            # A dummy run may have left some behind.
            counts=self._counts if input_batch.num_draft_tokens else None,
            num_scheduled=input_batch.num_draft_tokens,
            decodes=~input_batch.is_prefilling_np[: input_batch.num_reqs],
            reasons=reasons,
        )
        self._counts = None

    def take(
        self, totals: Increments, gauges: Increments, *, rests: bool = False
    ) -> PendingReport | None:
        """The step's report, with what was added to these totals since the last."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.rests = rests
            pending.increments |= self._since_last(totals) | gauges
        return pending

    def _since_last(self, totals: Increments) -> Increments:
        last, self._totals = self._totals, totals
        return {
            name: [
                now - then
                for now, then in zip(
                    values, last.get(name, [0.0] * len(values)), strict=True
                )
            ]
            for name, values in totals.items()
        }


class ReportedOutput(AsyncModelRunnerOutput):
    """The model runner's output with the report on it.

    Counts were copied on the stream of the forward pass, ahead of the sampled tokens
    that the output waits for: it needs no wait of its own.
    """

    def __init__(self, output: Any, pending: PendingReport) -> None:
        self._output = output
        self._pending = pending

    def get_output(self) -> Any:
        output = self._output.get_output()
        setattr(output, REPORT, self._pending.finish())
        return output

    def get_kv_connector_output(self) -> Any:
        return self._output.get_kv_connector_output()
