"""Where draft tokens come from: one file per proposer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What a proposer may look at. Read-only; add a field, never a parameter."""

    slots: npt.NDArray[np.int32]  # [num_reqs], batch row -> request slot
    token_ids: npt.NDArray[np.int32]  # [max_num_reqs, max_model_len], prompt + output
    num_tokens: npt.NDArray[np.int64]  # [max_num_reqs], committed tokens per slot
    max_candidates: int | None = None  # for a row; the load may leave room for few

    def width(self, max_candidates: int) -> int:
        """How many to suggest for a row at most, of a proposer's own maximum."""
        if self.max_candidates is None:
            return max_candidates
        return min(max_candidates, self.max_candidates)


@dataclass(frozen=True, slots=True)
class Candidates:
    """A proposer's guesses, before anyone decides which ones are worth verifying.

    One tree per batch row, parents before children, no two siblings alike and no score
    above its parent's, so that scores of one proposer compare wherever they are.
    """

    token_ids: npt.NDArray[np.int32]  # [num_reqs, max_candidates]
    parents: npt.NDArray[np.int32]  # [num_reqs, max_candidates], -1: child of the root
    scores: npt.NDArray[np.float32]  # [num_reqs, max_candidates], log-prob of the path
    num_candidates: npt.NDArray[np.int32]  # [num_reqs], columns past it are stale

    @classmethod
    def allocate(cls, num_reqs: int, max_candidates: int) -> Candidates:
        """No candidates yet, and room for some."""
        shape = (num_reqs, max_candidates)
        return cls(
            token_ids=np.zeros(shape, np.int32),
            parents=np.full(shape, -1, np.int32),
            scores=np.zeros(shape, np.float32),
            num_candidates=np.zeros(num_reqs, np.int32),
        )


class Proposer(Protocol):
    """Suggests continuations. Knows nothing about budgets, verification or vLLM.

    A slot's life: ``add_request``, then any number of ``propose`` and ``learn`` with
    a growing history, then ``remove_request``. A preempted request comes back through
    ``add_request`` with its whole history.
    """

    name: str

    def add_request(self, slot: int) -> None:
        """A new request took ``slot``; forget whatever the slot held."""

    def remove_request(self, slot: int) -> None:
        """The request in ``slot`` ended; what it taught may be kept."""

    def propose(self, step: DecodeStep) -> Candidates:
        """Guess what follows each request's newest token."""

    def learn(self, step: DecodeStep) -> None:
        """Index newly committed tokens. Runs after drafts were handed over, possibly
        on another thread, never at the same time as another method."""

    def clear(self) -> None:
        """Forget everything learned from all requests."""
