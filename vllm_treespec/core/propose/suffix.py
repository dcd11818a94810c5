"""Suffix decoding: what followed this context before, in any request's text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vllm_treespec.core.propose import Candidates, DecodeStep
from vllm_treespec.core.propose.native import frozen
from vllm_treespec.core.propose.suffix_index import (
    TOKEN_MIX,
    Index,
    fingerprint,
    learn_texts,
)
from vllm_treespec.core.propose.suffix_tree import grow_trees


class SuffixProposer:
    """Suggests what followed the newest tokens before, in any request.

    The idea is SuffixDecoding's (arXiv 2411.04975); the model is not a suffix tree but
    prediction by partial matching over hashed contexts (``suffix_index``), so that
    every drafted node draws on all shorter contexts too and ``scores`` are measured
    frequencies. Memory is bounded by construction: 192 bytes per cached token
    (``BYTES_PER_TOKEN``). Token ids must be below 2 ** 24.
    """

    name = "suffix"

    def __init__(
        self,
        *,
        max_num_reqs: int,
        max_nodes: int,
        max_depth: int = 64,
        max_cached_tokens: int = 1_000_000,
        max_learned_tokens: int = 4096,
        min_log_prob: float = -9.0,
    ) -> None:
        """Compiles (or loads) the native code, so that no request waits for it.

        ``max_learned_tokens`` bounds one ``learn``, the rest of a long prompt follows
        in the next ones. A context not met for ``max_cached_tokens`` is forgotten.
        """
        self.max_nodes = max_nodes
        self.max_depth = max_depth
        self.max_cached_tokens = max_cached_tokens
        self.max_learned_tokens = max_learned_tokens
        self.min_log_prob = min_log_prob
        if problems := list(self._problems(max_num_reqs)):
            raise ValueError("; ".join(problems))
        # request slot -> its text; all zero: no request yet
        self._salts = np.zeros(max_num_reqs, np.uint64)
        self._namespaces = np.zeros(max_num_reqs, np.uint64)  # 0: everybody's
        self._is_remembered = np.ones(max_num_reqs, np.bool_)
        self._fingerprints = np.zeros(max_num_reqs, np.uint64)
        self._num_learned = np.zeros(max_num_reqs, np.int64)
        self._num_given = np.zeros(max_num_reqs, np.int64)  # tokens at the first learn
        self._num_requests = 0
        # (tokens, fingerprint) -> (salt, clock) of text whose request left, oldest first
        self._left: dict[tuple[int, int], tuple[np.uint64, int]] = {}
        self.clear()
        self._warm_up()

    def _problems(self, max_num_reqs: int) -> Iterator[str]:
        minimum = {
            "max_num_reqs": max_num_reqs,
            "max_nodes": self.max_nodes,
            "max_depth": self.max_depth,
            "max_cached_tokens": self.max_cached_tokens,
            "max_learned_tokens": self.max_learned_tokens,
        }
        for option, value in minimum.items():
            if value < 1:
                yield f"{option}={value}: must be at least 1"
        if self.min_log_prob > 0.0:
            yield f"min_log_prob={self.min_log_prob}: must not be above 0"

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose contexts are remembered."""
        return min(int(self._index.clock[0]), self.max_cached_tokens)

    def add_request(self, slot: int) -> None:
        self.remove_request(slot)
        self._num_requests += 1
        self._salts[slot] = _salt(self._num_requests)
        self._namespaces[slot] = 0
        self._is_remembered[slot] = True

    def keep_apart(self, slot: int, namespace: int, *, is_remembered: bool) -> None:
        """What the request in ``slot`` teaches is for its namespace only, 0 being that
        of all who have none, or for nobody. To be called before it has learned."""
        self._namespaces[slot] = self._fingerprints[slot] = namespace
        self._is_remembered[slot] = is_remembered

    def remove_request(self, slot: int) -> None:
        """Keep what it taught, and a note of where to go on should it come back."""
        num_learned = int(self._num_learned[slot])
        if num_learned and self._is_remembered[slot]:
            key = (num_learned, int(self._fingerprints[slot]))
            self._left.pop(key, None)
            self._left[key] = (self._salts[slot], int(self._index.clock[0]))
            if len(self._left) > len(self._salts):
                del self._left[next(iter(self._left))]
        self._num_learned[slot] = 0
        self._num_given[slot] = 0
        self._fingerprints[slot] = 0

    def propose(self, step: DecodeStep) -> Candidates:
        candidates = Candidates.allocate(len(step.slots), step.width(self.max_nodes))
        grow_trees(
            self._index.entries,
            self._index.calibration,
            self._index.clock,
            self._index.window,
            self._salts,
            self._namespaces,
            frozen(step.slots),
            frozen(step.token_ids),
            frozen(step.num_tokens),
            np.float32(np.exp(self.min_log_prob)),
            self.max_depth,
            candidates.token_ids,
            candidates.parents,
            candidates.scores,
            candidates.num_candidates,
        )
        return candidates

    def learn(self, step: DecodeStep) -> None:
        """Index what is new, the shortest backlog first: decoding before prompts."""
        token_ids = frozen(step.token_ids)
        for slot in step.slots[self._num_given[step.slots] == 0]:
            self._resume(slot, token_ids[slot, : step.num_tokens[slot]])
        backlog = step.num_tokens[step.slots] - self._num_learned[step.slots]
        order = np.argsort(backlog, kind="stable")
        backlog = np.maximum(backlog[order], 0)
        num_before = np.cumsum(backlog) - backlog
        learn_texts(
            self._index.entries,
            self._index.calibration,
            self._index.clock,
            self._index.window,
            step.slots[order],
            token_ids,
            np.clip(self.max_learned_tokens - num_before, 0, backlog),
            self._num_learned,
            self._fingerprints,
            self._salts,
            self._namespaces,
            self._is_remembered,
            self._num_given,
        )

    def _resume(self, slot: int, history: npt.NDArray[np.int32]) -> None:
        """Skip the longest start of ``history`` that was learned before it left.

        Serves a preempted request, and the next turn of a conversation.
        """
        self._num_given[slot] = len(history)
        if not self._is_remembered[slot]:
            return
        value, begin = self._namespaces[slot], 0
        for key in sorted(self._left):
            num_tokens, expected = key
            if num_tokens > len(history):
                break
            value = np.uint64(fingerprint(history, begin, num_tokens, value))
            begin = num_tokens
            salt, clock = self._left[key]
            is_cached = self._index.clock[0] - clock <= self.max_cached_tokens
            if value == expected and is_cached:
                resumed = key
                self._salts[slot] = salt
                self._fingerprints[slot] = value
                self._num_learned[slot] = num_tokens
        if self._num_learned[slot]:
            del self._left[resumed]

    def clear(self) -> None:
        """Forget all text. Requests that go on are indexed anew from their start."""
        self._index = Index.allocate(self.max_cached_tokens)
        self._num_learned[:] = 0
        self._num_given[:] = 0
        self._fingerprints[:] = self._namespaces
        self._left.clear()

    def _warm_up(self) -> None:
        step = DecodeStep(
            slots=np.zeros(1, np.int32),
            token_ids=np.array([[1, 2, 1]], np.int32),
            num_tokens=np.array([3], np.int64),
        )
        for _ in range(2):  # the second time, to resume
            self.add_request(0)
            self.learn(step)
        self.propose(step)
        self.remove_request(0)
        self.clear()
        self._num_requests = 0
        self._salts[:] = 0


def _salt(number: int) -> np.uint64:
    """Never 0, which is everybody's text: an odd factor permutes the integers."""
    return np.uint64(number * int(TOKEN_MIX) % (1 << 64))
