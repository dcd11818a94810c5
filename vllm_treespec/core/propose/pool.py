"""All proposers of an engine behind one call: they share threads, faults and checks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from vllm_treespec.core.propose import Candidates, DecodeStep, Proposer

logger = logging.getLogger(f"vllm.{__name__}")


class ProposerPool:
    """Asks every proposer for candidates and lets them learn off the request path.

    A proposer that raises or returns nonsense is dismissed with one log line: it may
    cost speed, never a request.
    """

    def __init__(
        self, proposers: Sequence[Proposer], *, max_candidates: int, vocab_size: int
    ) -> None:
        self.names = [proposer.name for proposer in proposers]
        self._proposers: list[Proposer | None] = list(proposers)
        self.seconds = [0.0] * len(proposers)  # of the last ``propose``
        self._max_candidates = max_candidates
        self._vocab_size = vocab_size
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="treespec-learn")
        self._learning: Future[None] | None = None

    def add_request(self, slot: int) -> None:
        self.settle()
        for index, proposer in self._active():
            try:
                proposer.add_request(slot)
            except Exception:  # a proposer may fail in any way; see the class docstring
                self._dismiss(index)

    def remove_request(self, slot: int) -> None:
        self.settle()
        for index, proposer in self._active():
            try:
                proposer.remove_request(slot)
            except Exception:  # see add_request
                self._dismiss(index)

    def propose(
        self, step: DecodeStep, drafting: Sequence[bool] | None = None
    ) -> list[Candidates]:
        """Candidates of every proposer, empty ones from those that are not ``drafting``
        or were dismissed. ``seconds`` then says how long each took."""
        self.settle()
        results = [Candidates.allocate(len(step.slots), 0)] * len(self._proposers)
        self.seconds = [0.0] * len(self._proposers)
        for index, proposer in self._active():
            if drafting is not None and not drafting[index]:
                continue
            start = time.perf_counter()
            try:
                candidates = proposer.propose(step)
                self._check(candidates, len(step.slots))
                results[index] = candidates
            except Exception:  # see add_request
                self._dismiss(index)
            self.seconds[index] = time.perf_counter() - start
        return results

    def learn(self, step: DecodeStep) -> None:
        """Start indexing the step's tokens; the next call of any method waits."""
        self.settle()
        self._learning = self._executor.submit(self._learn, step)

    def settle(self) -> None:
        """Wait for learning to end; only then may the history change."""
        if self._learning is not None:
            self._learning.result()
            self._learning = None

    def clear(self) -> None:
        """Forget everything learned from all requests."""
        self.settle()
        for _, proposer in self._active():
            proposer.clear()

    def shutdown(self) -> None:
        self._executor.shutdown(wait=True)

    def _learn(self, step: DecodeStep) -> None:
        for index, proposer in self._active():
            try:
                proposer.learn(step)
            except Exception:  # see add_request
                self._dismiss(index)

    def _active(self) -> list[tuple[int, Proposer]]:
        return [
            (index, proposer)
            for index, proposer in enumerate(self._proposers)
            if proposer is not None
        ]

    def _dismiss(self, index: int) -> None:
        logger.exception(
            "treespec: proposer %r failed and is off until restart; "
            "requests go on without it",
            self.names[index],
        )
        self._proposers[index] = None

    def _check(self, candidates: Candidates, num_reqs: int) -> None:
        counts = candidates.num_candidates
        width = candidates.token_ids.shape[1]
        if counts.shape != (num_reqs,) or width > self._max_candidates:
            raise ValueError(
                f"candidates for {counts.shape[0]} rows of {width}, asked for "
                f"{num_reqs} rows of at most {self._max_candidates}"
            )
        columns = np.arange(width)
        used = columns < counts[:, None]
        parents, token_ids = candidates.parents, candidates.token_ids
        if np.any(used & ((parents < -1) | (parents >= columns))):
            raise ValueError("a candidate's parent must precede it")
        if np.any(used & ((token_ids < 0) | (token_ids >= self._vocab_size))):
            raise ValueError(f"a candidate is outside [0, {self._vocab_size})")
        has_parent = used & (parents >= 0)
        parent_scores = np.take_along_axis(
            candidates.scores, np.where(has_parent, parents, 0), axis=1
        )
        bounds = np.where(has_parent, parent_scores, 0.0)
        # not scores > bounds, which would let NaN pass
        if np.any(used & ~(candidates.scores <= bounds)):
            raise ValueError("a candidate's score must be at most its parent's, and 0")
