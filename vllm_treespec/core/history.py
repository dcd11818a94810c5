"""What each request has said so far, on the host, where model-free proposers look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """Committed tokens of every request slot: prompt, then output."""

    token_ids: npt.NDArray[np.int32]  # [max_num_reqs, max_model_len]
    num_tokens: npt.NDArray[np.int64]  # [max_num_reqs], columns past it are stale

    @classmethod
    def allocate(cls, max_num_reqs: int, max_model_len: int) -> TokenHistory:
        # Pages are only backed by memory once they are written.
        return cls(
            token_ids=np.zeros((max_num_reqs, max_model_len), dtype=np.int32),
            num_tokens=np.zeros(max_num_reqs, dtype=np.int64),
        )

    def start(self, slot: int, token_ids: Sequence[int]) -> None:
        """A new request took ``slot``; a resumed one brings its output along."""
        self.token_ids[slot, : len(token_ids)] = token_ids
        self.num_tokens[slot] = len(token_ids)

    def append(
        self,
        slots: npt.NDArray[np.int32],  # [num_reqs], batch row -> request slot
        sampled: npt.NDArray[np.int32],  # [num_reqs, max_new], stale past num_sampled
        num_sampled: npt.NDArray[np.int32],  # [num_reqs]
    ) -> None:
        for slot, row, count in zip(slots, sampled, num_sampled, strict=True):
            start = self.num_tokens[slot]
            # Tokens past max_model_len are dropped by the scheduler as well.
            count = min(count, self.token_ids.shape[1] - start)
            self.token_ids[slot, start : start + count] = row[:count]
            self.num_tokens[slot] = start + count
