"""Whether candidates make sense, looked at once a step for all of a batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_treespec.core.propose import Candidates
from vllm_treespec.core.propose.native import frozen, native

PROBLEMS = (
    "",
    "a row has fewer than no candidates, or more than it has columns",
    "a candidate's parent must precede it",
    "a candidate is outside the vocabulary",
    "a candidate's score must be at most its parent's, and 0",
)


def check_candidates(
    candidates: Candidates, *, num_reqs: int, max_candidates: int, vocab_size: int
) -> None:
    """
    Raises:
        ValueError: if no tree looks like this.
    """
    shape = candidates.token_ids.shape
    if shape[0] != num_reqs or shape[1] > max_candidates:
        raise ValueError(
            f"candidates for {shape[0]} rows of {shape[1]}, asked for {num_reqs} rows "
            f"of at most {max_candidates}"
        )
    for name, expected, dtype in (
        ("token_ids", shape, np.int32),
        ("parents", shape, np.int32),
        ("scores", shape, np.float32),
        ("num_candidates", shape[:1], np.int32),
    ):
        found = getattr(candidates, name)
        if found.shape != expected or found.dtype != dtype:
            raise ValueError(
                f"{name} of shape {found.shape} and type {found.dtype}, expected "
                f"{expected} and {np.dtype(dtype)}"
            )
    problem = _problem_of(
        frozen(candidates.token_ids),
        frozen(candidates.parents),
        frozen(candidates.scores),
        frozen(candidates.num_candidates),
        vocab_size,
    )
    if problem:
        raise ValueError(PROBLEMS[problem])


@native
def _problem_of(
    token_ids: npt.NDArray[np.int32],
    parents: npt.NDArray[np.int32],
    scores: npt.NDArray[np.float32],
    num_candidates: npt.NDArray[np.int32],
    vocab_size: int,
) -> int:
    """The first one's place in ``PROBLEMS``, 0: none."""
    for row in range(token_ids.shape[0]):
        if not 0 <= num_candidates[row] <= token_ids.shape[1]:
            return 1
        for node in range(num_candidates[row]):
            parent = parents[row, node]
            if not -1 <= parent < node:
                return 2
            if not 0 <= token_ids[row, node] < vocab_size:
                return 3
            bound = np.float32(0.0)
            if parent >= 0:
                bound = scores[row, parent]
            if not scores[row, node] <= bound:  # neither is NaN
                return 4
    return 0


def compile_check() -> None:
    """Compile, or load, what runs in a step, so that no request waits for it."""
    check_candidates(
        Candidates.allocate(1, 1), num_reqs=1, max_candidates=1, vocab_size=1
    )
