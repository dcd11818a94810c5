"""All proposers on the host behind one call: they share threads, faults and checks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm_treespec.core.propose import Candidates, DecodeStep, Proposer
from vllm_treespec.core.propose.check import check_candidates, compile_check
from vllm_treespec.core.propose.lane import Answer, Lane

logger = logging.getLogger(f"vllm.{__name__}")


class ProposerPool:
    """Asks every proposer for candidates and lets them learn off the request path.

    A proposer that raises, returns nonsense or takes longer than ``timeout`` seconds is
    dismissed with one log line: it may cost speed, never a request.
    """

    def __init__(
        self,
        proposers: Sequence[Proposer],
        *,
        max_candidates: int,
        vocab_size: int,
        timeout: float,
    ) -> None:
        self.names = [proposer.name for proposer in proposers]
        self.is_dismissed = [False] * len(proposers)
        self.seconds = [0.0] * len(proposers)  # of the last ``propose``
        self._lanes = [Lane(proposer) for proposer in proposers]
        self._max_candidates = max_candidates
        self._vocab_size = vocab_size
        self._timeout = timeout
        self._learning: dict[int, Answer] = {}
        compile_check()

    def add_request(self, slot: int) -> None:
        self._ask(lambda proposer: proposer.add_request(slot))

    def remove_request(self, slot: int) -> None:
        self._ask(lambda proposer: proposer.remove_request(slot))

    def clear(self) -> None:
        """Forget everything learned from all requests."""
        self._ask(lambda proposer: proposer.clear())

    def propose(
        self, step: DecodeStep, drafting: Sequence[bool] | None = None
    ) -> list[Candidates]:
        """Candidates of every proposer, empty ones from those that are not ``drafting``
        or were dismissed. ``seconds`` then says how long each took."""
        num_reqs = len(step.slots)
        results = [Candidates.allocate(num_reqs, 0)] * len(self._lanes)
        self.seconds = [0.0] * len(self._lanes)
        wanted = drafting or [True] * len(self._lanes)

        def draft(proposer: Proposer) -> tuple[Candidates, float]:
            start = time.perf_counter()
            candidates = proposer.propose(step)
            check_candidates(
                candidates,
                num_reqs=num_reqs,
                max_candidates=self._max_candidates,
                vocab_size=self._vocab_size,
            )
            return candidates, time.perf_counter() - start

        for index, done in self._ask(draft, wanted).items():
            results[index], self.seconds[index] = done
        return results

    def learn(self, step: DecodeStep) -> None:
        """Start indexing the step's tokens; the next call of any method waits."""
        self.settle()
        self._learning = self._submit(lambda proposer: proposer.learn(step))

    def settle(self) -> None:
        """Wait for learning to end; only then may the history change."""
        self._collect(self._learning)
        self._learning = {}

    def shutdown(self) -> None:
        self.settle()
        for lane in self._lanes:
            lane.close()

    def _ask(
        self,
        call: Callable[[Proposer], Any],
        wanted: Sequence[bool] | None = None,
    ) -> dict[int, Any]:
        """Per proposer that could do it, what it returned."""
        self.settle()
        return self._collect(self._submit(call, wanted))

    def _submit(
        self,
        call: Callable[[Proposer], Any],
        wanted: Sequence[bool] | None = None,
    ) -> dict[int, Answer]:
        return {
            index: lane.submit(call, lane.proposer)
            for index, lane in enumerate(self._lanes)
            if not self.is_dismissed[index] and (wanted is None or wanted[index])
        }

    def _collect(self, answers: dict[int, Answer]) -> dict[int, Any]:
        deadline = time.monotonic() + self._timeout
        results = {}
        for index, answer in answers.items():
            try:
                results[index] = answer.result(max(deadline - time.monotonic(), 0.0))
            except Exception as error:  # it may fail in any way
                self._dismiss(index, error)
        return results

    def _dismiss(self, index: int, error: Exception) -> None:
        name = self.names[index]
        if isinstance(error, TimeoutError):
            error = TimeoutError(f"no answer within {self._timeout:g} s")
        logger.error(
            "treespec: proposer %r failed and is off until restart; "
            "requests go on without it",
            name,
            exc_info=error,
        )
        self.is_dismissed[index] = True
        self._lanes[index].close()
