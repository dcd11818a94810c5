"""Build: which guesses are worth verifying?

Candidates of all proposers become one tree per request, then the best ancestor-closed
nodes are kept, best first. A path's score is the sum of its conditional log-probs, so
scores only fall along a path and a global top-k is closed under ancestors (as in
SpecExec, arXiv:2406.02532, and OPT-Tree, arXiv:2406.17276).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.propose import Candidates
from vllm_treespec.core.tree import TreeBuffers


@dataclass(frozen=True, slots=True)
class MergedCandidates:
    """One tree per batch row, every node remembering who proposed it."""

    token_ids: torch.Tensor  # [max_num_reqs, max_candidates] int32
    parents: torch.Tensor  # [max_num_reqs, max_candidates] int32, -1: the root's child
    log_probs: torch.Tensor  # [max_num_reqs, max_candidates] float32, given the parent
    proposers: torch.Tensor  # [max_num_reqs, max_candidates] int32, bit per proposer
    num_candidates: torch.Tensor  # [max_num_reqs] int32

    @classmethod
    def allocate(
        cls, max_num_reqs: int, max_candidates: int, device: torch.device
    ) -> MergedCandidates:
        def empty(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(max_num_reqs, max_candidates, dtype=dtype, device=device)

        return cls(
            token_ids=empty(torch.int32),
            parents=empty(torch.int32),
            log_probs=empty(torch.float32),
            proposers=empty(torch.int32),
            num_candidates=torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
        )


class Upload:
    """A host array and its device copy, filled anew each step.

    The copy is not waited for. Nothing overwrites the host side too early, because
    drafting on the host starts by waiting for the device.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        on_cpu = device.type == "cpu"
        host = torch.zeros(shape, dtype=dtype, pin_memory=not on_cpu)
        self.np: npt.NDArray[Any] = host.numpy()
        self._host = host
        self._device = host if on_cpu else torch.zeros_like(host, device=device)

    def send(self) -> torch.Tensor:
        """The device side, as large as the host side."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        return self._device


class TreeBuilder:
    """Turns host candidates into device trees."""

    def __init__(
        self,
        kernels: KernelSet,
        trees: TreeBuffers,
        *,
        num_proposers: int,
        max_candidates: int,
    ) -> None:
        self._kernels = kernels
        self._trees = trees
        self._device = device = trees.parents.device
        max_num_reqs = trees.parents.shape[0]
        shape = (num_proposers, max_num_reqs, max_candidates)
        self._token_ids = Upload(shape, torch.int32, device)
        self._parents = Upload(shape, torch.int32, device)
        self._log_probs = Upload(shape, torch.float32, device)
        self._counts = Upload(shape[:2], torch.int32, device)
        self._budgets = Upload(shape[1:2], torch.int32, device)
        self._chain_only = Upload(shape[1:2], torch.int32, device)
        self._merged = MergedCandidates.allocate(
            max_num_reqs, num_proposers * max_candidates, device
        )

    def build(
        self,
        candidates: Sequence[Candidates],  # one per proposer
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        budgets: npt.NDArray[np.int32],  # [num_reqs], nodes to keep, root excluded
        chain_only: npt.NDArray[np.bool_],  # [num_reqs], keep the best path only
    ) -> torch.Tensor:
        """Replace the slots' trees.

        Returns:
            ``[num_reqs, max_num_nodes - 1]`` int64 draft tokens in node order, root
            excluded; unused columns hold a valid id.
        """
        num_reqs = slots.shape[0]
        self._fill(candidates)
        self._budgets.np[:num_reqs] = budgets
        self._chain_only.np[:num_reqs] = chain_only
        rows = slice(num_reqs)
        merged, trees = self._merged, self._trees
        self._kernels.merge_candidates(
            self._token_ids.send()[:, rows],
            self._parents.send()[:, rows],
            self._log_probs.send()[:, rows],
            self._counts.send()[:, rows],
            merged.token_ids[rows],
            merged.parents[rows],
            merged.log_probs[rows],
            merged.proposers[rows],
            merged.num_candidates[rows],
        )
        # Allocated anew: vLLM may still copy the last step's drafts to the host.
        draft_tokens = torch.zeros(
            num_reqs, trees.parents.shape[1] - 1, dtype=torch.int64, device=self._device
        )
        self._kernels.select_nodes(
            slots,
            merged.token_ids[rows],
            merged.parents[rows],
            merged.log_probs[rows],
            merged.proposers[rows],
            merged.num_candidates[rows],
            self._budgets.send()[rows],
            self._chain_only.send()[rows],
            trees.token_ids,
            trees.parents,
            trees.proposers,
            trees.num_nodes,
            draft_tokens,
        )
        self._kernels.ancestor_mask(
            slots, trees.parents, trees.num_nodes, trees.depths, trees.masks
        )
        return draft_tokens

    def _fill(self, candidates: Sequence[Candidates]) -> None:
        for proposer, each in enumerate(candidates):
            num_reqs, width = each.token_ids.shape
            self._token_ids.np[proposer, :num_reqs, :width] = each.token_ids
            self._parents.np[proposer, :num_reqs, :width] = each.parents
            self._log_probs.np[proposer, :num_reqs, :width] = each.log_probs
            self._counts.np[proposer, :num_reqs] = each.num_candidates
