"""Build: which guesses are worth verifying?

Candidates of all proposers become one tree per request, then the best ancestor-closed
nodes are kept, best first. Scores are path log-probabilities, calibrated so that those
of different proposers compare; they only fall along a path, so a global top-k is closed
under ancestors (as in SpecExec, arXiv:2406.02532, and OPT-Tree, arXiv:2406.17276).

What a proposer's score is worth depends on the company: a path that others propose as
well is right more often than one that they had the chance to propose and did not. So
each proposer is calibrated apart for the company that its path has, and a path that
several propose gets the mean of what they make of it. The best of them would be the one
that errs upwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_treespec.core.calibrate import Calibration
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.propose import Candidates
from vllm_treespec.core.tree import TreeBuffers

NUM_COMPANIES = 3  # nobody else proposes anything; others do, but not this; others do


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
        # Rows of one proposer follow each other, one for each company.
        self._calibration = Calibration(num_proposers * NUM_COMPANIES, device)
        self._was_drawn: torch.Tensor | None = None
        shape = self._merged.parents.shape  # [max_num_reqs, max_merged]
        self._labels = torch.zeros((1, *shape), dtype=torch.int8, device=device)
        # Each proposer's own score of a node, and the company that its path has.
        self._scores = torch.zeros((num_proposers, *shape), device=device)
        self._company = torch.zeros(
            (num_proposers * NUM_COMPANIES, *shape), dtype=torch.bool, device=device
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
        merged, labels = self._merged, self._labels[:, rows]
        self._kernels.label_candidates(
            merged.token_ids[None, rows],
            merged.parents[None, rows],
            merged.num_candidates[None, rows],
            emitted,
            num_emitted,
            labels,
        )
        labels = torch.where(self._company[:, rows], labels, -1)
        if self._was_drawn is not None:
            # Drawn candidates have no scores to calibrate.
            labels[:NUM_COMPANIES].masked_fill_(self._was_drawn[:, None], -1)
        self._calibration.observe(self._for_companies(rows), labels)

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
        merged, trees = self._merged, self._trees
        self._merge(rows)
        self._score(rows)
        self._was_drawn = is_drawn
        if is_drawn is not None:
            by_first = merged.proposers[rows] & 1 > 0
            merged.scores[rows].masked_fill_(is_drawn[:, None] & by_first, 0.0)
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

    def _merge(self, rows: slice) -> None:
        """One tree of all candidates, and each proposer's own scores of its nodes."""
        candidates, merged = self.candidates, self._merged
        for proposer, scores in enumerate(self._scores):
            # A node keeps the best score that it is given: here, the only one.
            only = torch.full_like(candidates.scores[:, rows], -torch.inf)
            only[proposer] = candidates.scores[proposer, rows]
            self._kernels.merge_candidates(
                candidates.token_ids[:, rows],
                candidates.parents[:, rows],
                only,
                candidates.num_candidates[:, rows],
                merged.token_ids[rows],
                merged.parents[rows],
                scores[rows],
                merged.proposers[rows],
                merged.num_candidates[rows],
            )

    def _score(self, rows: slice) -> None:
        """Find out each node's company, and what it is worth in that."""
        merged, num_proposers = self._merged, self._scores.shape[0]
        bits = merged.proposers[rows]
        columns = torch.arange(bits.shape[1], device=bits.device)
        is_node = columns < merged.num_candidates[rows, None]
        own = 1 << torch.arange(num_proposers, device=bits.device, dtype=bits.dtype)
        own = own[:, None, None]
        others_have = bits & ~own != 0
        offers = (self.candidates.num_candidates[:, rows] > 0).int()
        others_offer = (offers.sum(0) - offers > 0)[:, :, None]
        company = torch.stack(
            [~others_have & ~others_offer, ~others_have & others_offer, others_have], 1
        )
        # What a proposer scores with no number has only what the others say of it.
        has_score = (bits & own != 0) & is_node & self._scores[:, rows].isfinite()
        company &= has_score[:, None]
        self._company[:, rows] = company.flatten(0, 1)
        company = self._company[:, rows]
        worth = self._calibration.apply(self._for_companies(rows))
        total = torch.where(company, worth, 0.0).sum(0)
        merged.scores[rows] = total / company.sum(0)  # no node: NaN, and not used

    def _for_companies(self, rows: slice) -> torch.Tensor:
        """``[num_proposers * NUM_COMPANIES, num_rows, max_merged]`` float32."""
        scores = self._scores[:, None, rows]
        return scores.expand(-1, NUM_COMPANIES, -1, -1).flatten(0, 1)
