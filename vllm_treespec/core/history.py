"""What each request has said so far, on the host, where model-free proposers look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_treespec.core.propose.native import frozen, native


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """Committed tokens of every request slot: prompt, then output."""

    token_ids: npt.NDArray[np.int32]  # [max_num_reqs, max_model_len]
    num_tokens: npt.NDArray[np.int64]  # [max_num_reqs], columns past it are stale

    @classmethod
    def allocate(cls, max_num_reqs: int, max_model_len: int) -> TokenHistory:
        """Compiles (or loads) the native code, so that no request waits for it."""
        # Pages are only backed by memory once they are written.
        history = cls(
            token_ids=np.zeros((max_num_reqs, max_model_len), dtype=np.int32),
            num_tokens=np.zeros(max_num_reqs, dtype=np.int64),
        )
        history.append(np.zeros(1, np.int32), np.zeros((1, 2), np.int32))
        return history

    def start(self, slot: int, token_ids: Sequence[int]) -> None:
        """A new request took ``slot``; a resumed one brings its output along."""
        self.token_ids[slot, : len(token_ids)] = token_ids
        self.num_tokens[slot] = len(token_ids)

    def append(
        self,
        slots: npt.NDArray[np.int32],  # [num_reqs], batch row -> request slot
        newest: npt.NDArray[np.int32],  # [num_reqs, 1 + max_new]: how many, which
    ) -> None:
        _append(self.token_ids, self.num_tokens, frozen(slots), frozen(newest))


@native
def _append(
    token_ids: npt.NDArray[np.int32],
    num_tokens: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int32],
    newest: npt.NDArray[np.int32],
) -> None:
    for row in range(slots.shape[0]):
        slot = slots[row]
        start = num_tokens[slot]
        # Tokens past max_model_len are dropped by the scheduler as well.
        count = min(np.int64(newest[row, 0]), token_ids.shape[1] - start)
        token_ids[slot, start : start + count] = newest[row, 1 : 1 + count]
        num_tokens[slot] = start + count
