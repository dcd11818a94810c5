"""Build: which guesses are worth verifying?

Candidates of all proposers become one tree per request, then the best ancestor-closed
nodes are kept, best first. A path's score is the sum of its conditional log-probs, so
scores only fall along a path and a global top-k is closed under ancestors (as in
SpecExec, arXiv:2406.02532, and OPT-Tree, arXiv:2406.17276).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        self._device = trees.parents.device
        max_num_reqs = trees.parents.shape[0]
        self._max_candidates = max_candidates
        self._merged = MergedCandidates.allocate(
            max_num_reqs, num_proposers * max_candidates, self._device
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
        token_ids = self._stack(candidates, "token_ids", np.int32)
        parents = self._stack(candidates, "parents", np.int32)
        log_probs = self._stack(candidates, "log_probs", np.float32)
        counts = np.stack([each.num_candidates for each in candidates])
        merged, trees = self._merged, self._trees
        self._kernels.merge_candidates(
            self._upload(token_ids),
            self._upload(parents),
            self._upload(log_probs),
            self._upload(counts.astype(np.int32)),
            merged.token_ids[:num_reqs],
            merged.parents[:num_reqs],
            merged.log_probs[:num_reqs],
            merged.proposers[:num_reqs],
            merged.num_candidates[:num_reqs],
        )
        # Allocated anew: vLLM may still copy the last step's drafts to the host.
        draft_tokens = torch.zeros(
            num_reqs, trees.parents.shape[1] - 1, dtype=torch.int64, device=self._device
        )
        self._kernels.select_nodes(
            slots,
            merged.token_ids[:num_reqs],
            merged.parents[:num_reqs],
            merged.log_probs[:num_reqs],
            merged.proposers[:num_reqs],
            merged.num_candidates[:num_reqs],
            self._upload(budgets.astype(np.int32)),
            self._upload(chain_only.astype(np.int32)),
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

    def _stack(
        self, candidates: Sequence[Candidates], name: str, dtype: type[np.generic]
    ) -> npt.NDArray[np.generic]:
        """[num_proposers, num_reqs, max_candidates], zero past each proposer's own."""
        num_reqs = candidates[0].num_candidates.shape[0]
        shape = (len(candidates), num_reqs, self._max_candidates)
        stacked = np.zeros(shape, dtype=dtype)
        for index, each in enumerate(candidates):
            columns = getattr(each, name)
            stacked[index, :, : columns.shape[1]] = columns
        return stacked

    def _upload(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        host = torch.from_numpy(array)
        if self._device.type == "cpu":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)
