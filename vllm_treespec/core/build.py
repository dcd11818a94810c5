"""Build: which guesses are worth verifying?

Candidates of all proposers become one tree per request, then the best ancestor-closed
nodes are kept, best first. Scores are path log-probabilities, calibrated so that those
of different proposers compare; they only fall along a path, so a global top-k is closed
under ancestors (as in SpecExec, arXiv:2406.02532, and OPT-Tree, arXiv:2406.17276).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_treespec.core.calibrate import Calibration
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.propose import Candidates
from vllm_treespec.core.tree import TreeBuffers


@dataclass(frozen=True, slots=True)
class MergedCandidates:
    """One tree per batch row, every node remembering who proposed it."""

    token_ids: torch.Tensor  # [max_num_reqs, max_candidates] int32
    parents: torch.Tensor  # [max_num_reqs, max_candidates] int32, -1: the root's child
    scores: torch.Tensor  # [max_num_reqs, max_candidates] float32, path log-prob
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
            scores=empty(torch.float32),
            proposers=empty(torch.int32),
            num_candidates=torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
        )


class TreeBuilder:
    """Turns candidates into trees, and learns what each proposer's scores are worth."""

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
        # Proposers on the device write here, those on the host through ``upload``.
        self.candidates = DeviceCandidates.allocate(
            num_proposers, max_num_reqs, max_candidates, device
        )
        self._merged = MergedCandidates.allocate(
            max_num_reqs, num_proposers * max_candidates, device
        )
        self._calibration = Calibration(num_proposers, device)
        self._was_drawn: torch.Tensor | None = None
        self._labels = torch.zeros(
            self.candidates.scores.shape, dtype=torch.int8, device=device
        )

    def upload(self, proposer: int, candidates: Candidates) -> None:
        """Take what a proposer on the host suggests; the copy is not waited for."""
        num_reqs, width = candidates.token_ids.shape
        mine = self.candidates.of(proposer)
        for source, target in (
            (candidates.token_ids, mine.token_ids[:num_reqs, :width]),
            (candidates.parents, mine.parents[:num_reqs, :width]),
            (candidates.scores, mine.scores[:num_reqs, :width]),
            (candidates.num_candidates, mine.num_candidates[:num_reqs]),
        ):
            host = torch.from_numpy(source)
            if self._device.type != "cpu":
                # Pinned anew each step: the last step's copy may still be under way.
                host = host.pin_memory()
            target.copy_(host, non_blocking=True)

    def forget(self, proposer: int, num_reqs: int) -> None:
        """This proposer suggests nothing this step."""
        self.candidates.num_candidates[proposer, :num_reqs] = 0

    def learn(
        self,
        emitted: torch.Tensor,  # [num_rows, max_emitted] int64, rows of the last build
        num_emitted: torch.Tensor,  # [num_rows] int32, 0: nothing is known of the row
    ) -> None:
        """Compare the last step's candidates with what the target said."""
        rows = slice(num_emitted.shape[0])
        candidates, labels = self.candidates, self._labels[:, rows]
        self._kernels.label_candidates(
            candidates.token_ids[:, rows],
            candidates.parents[:, rows],
            candidates.num_candidates[:, rows],
            emitted,
            num_emitted,
            labels,
        )
        if self._was_drawn is not None:
            # Drawn candidates have no scores to calibrate.
            labels[0].masked_fill_(self._was_drawn[:, None], -1)
        self._calibration.observe(candidates.scores[:, rows], labels)

    def build(
        self,
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        budgets: torch.Tensor,  # [num_reqs] int32, nodes to keep, root excluded
        chain_only: torch.Tensor,  # [num_reqs] int32, 1: keep the best path only
        is_drawn: torch.Tensor | None = None,  # [num_reqs] bool
    ) -> torch.Tensor:
        """Replace the slots' trees.

        Args:
            is_drawn: rows for which the first proposer drew its candidates. They come
                first, in their order, whatever they are: choosing would bias them.

        Returns:
            ``[num_reqs, max_num_nodes - 1]`` int64 draft tokens in node order, root
            excluded; unused columns hold a valid id.
        """
        num_reqs = slots.shape[0]
        rows = slice(num_reqs)
        candidates, merged, trees = self.candidates, self._merged, self._trees
        scores = self._calibration.apply(candidates.scores[:, rows])
        if is_drawn is not None:
            scores[0].masked_fill_(is_drawn[:, None], 0.0)
        self._was_drawn = is_drawn
        self._kernels.merge_candidates(
            candidates.token_ids[:, rows],
            candidates.parents[:, rows],
            scores,
            candidates.num_candidates[:, rows],
            merged.token_ids[rows],
            merged.parents[rows],
            merged.scores[rows],
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
            merged.scores[rows],
            merged.proposers[rows],
            merged.num_candidates[rows],
            budgets,
            chain_only,
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
