"""What the target said after the last step's drafts were made."""

from __future__ import annotations

import torch

NO_ROOT = 2**30  # behind every token, so that nothing was said after it


class Feedback:
    """Remembers where each slot's tree was rooted, for ``TreeBuilder.learn``."""

    def __init__(
        self, max_num_reqs: int, max_emitted: int, device: torch.device
    ) -> None:
        self._roots = torch.full(
            (max_num_reqs,), NO_ROOT, dtype=torch.int32, device=device
        )
        self._slots = torch.empty(0, dtype=torch.int64, device=device)
        self._columns = torch.arange(max_emitted, device=device)

    def forget(self, slot: int) -> None:
        """Another request took the slot."""
        self._roots[slot] = NO_ROOT

    def remember(
        self,
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        num_tokens: torch.Tensor,  # [max_num_reqs] int32, committed tokens per slot
    ) -> None:
        """Trees were drafted for these slots, rooted at their newest tokens."""
        self._slots = slots.clone()  # the runner's buffer serves the next step, too
        self._roots[self._slots] = num_tokens[self._slots] - 1

    def emitted(
        self,
        token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] int32, per slot
        num_tokens: torch.Tensor,  # [max_num_reqs] int32, committed tokens per slot
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens after the root ``[num_rows, max_emitted]`` int32, stale past their
        number ``[num_rows]`` int32, for the rows of the last ``remember``."""
        slots, roots = self._slots, self._roots[self._slots]
        columns = roots[:, None] + 1 + self._columns
        last = token_ids.shape[1] - 1
        emitted = token_ids[slots[:, None], columns.clamp(max=last)]
        counts = (num_tokens[slots] - 1 - roots).clamp(0, self._columns.shape[0])
        return emitted, counts.int()
