"""Candidates of all proposers on the device, where they are merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DeviceCandidates:
    """One tree per proposer and batch row, parents before children.

    ``of`` gives one proposer's part without the leading dimension.
    """

    token_ids: torch.Tensor  # [num_proposers, max_num_reqs, max_candidates] int32
    parents: (
        torch.Tensor
    )  # [num_proposers, max_num_reqs, max_candidates] int32, -1: root
    scores: (
        torch.Tensor
    )  # [num_proposers, max_num_reqs, max_candidates] float32, path log-prob
    num_candidates: torch.Tensor  # [num_proposers, max_num_reqs] int32

    @classmethod
    def allocate(
        cls,
        num_proposers: int,
        max_num_reqs: int,
        max_candidates: int,
        device: torch.device,
    ) -> DeviceCandidates:
        shape = (num_proposers, max_num_reqs, max_candidates)

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            token_ids=zeros(*shape),
            parents=zeros(*shape),
            scores=zeros(*shape, dtype=torch.float32),
            num_candidates=zeros(*shape[:2]),
        )

    def of(self, proposer: int) -> DeviceCandidates:
        return DeviceCandidates(
            self.token_ids[proposer],
            self.parents[proposer],
            self.scores[proposer],
            self.num_candidates[proposer],
        )
