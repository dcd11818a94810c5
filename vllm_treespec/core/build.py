"""Build: which guesses are worth verifying?

Candidates of all proposers become one tree per request, then the best ancestor-closed
nodes are kept, best first. Scores are path log-probabilities, corrected so that those of
different proposers compare; they only fall along a path, so a global top-k is closed
under ancestors (as in SpecExec, arXiv:2406.02532, and OPT-Tree, arXiv:2406.17276).

What a proposer's word is worth depends on the company: a child that others propose as
well is right more often than one beside which they propose something else. So every
proposer is heard as a voice of its own in each company, and offers more than a tree has
room for, which lets proposers meet. Voices are mixed child by child, as odds given the
parent (``mix``), and children's log-probs add up along paths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.mix import Mixture
from vllm_treespec.core.propose import Candidates
from vllm_treespec.core.transfer import pinned
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.kernels.mixing import NUM_SUMS


@dataclass(frozen=True, slots=True)
class MergedCandidates:
    """One tree per request slot, every node remembering who proposed it."""

    token_ids: torch.Tensor  # [max_num_reqs, max_merged] int32
    parents: torch.Tensor  # [max_num_reqs, max_merged] int32, -1: the root's child
    proposers: torch.Tensor  # [max_num_reqs, max_merged] int32, bit per proposer
    own_scores: (
        torch.Tensor
    )  # [num_proposers, max_num_reqs, max_merged] float32, -inf: not its own
    scores: torch.Tensor  # [max_num_reqs, max_merged] float32, path log-prob
    num_nodes: torch.Tensor  # [max_num_reqs] int32
    sibling_bits: torch.Tensor  # [max_num_reqs, max_merged] int32, bit per proposer of
    # any child of the node's parent

    @classmethod
    def allocate(
        cls,
        num_proposers: int,
        max_num_reqs: int,
        max_merged: int,
        device: torch.device,
    ) -> MergedCandidates:
        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        shape = (max_num_reqs, max_merged)
        return cls(
            token_ids=zeros(*shape),
            parents=zeros(*shape),
            proposers=zeros(*shape),
            own_scores=zeros(num_proposers, *shape, dtype=torch.float32),
            scores=zeros(*shape, dtype=torch.float32),
            num_nodes=zeros(max_num_reqs),
            sibling_bits=zeros(*shape),
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
            num_proposers, max_num_reqs, num_proposers * max_candidates, device
        )
        self._mixture = Mixture.allocate(num_proposers, device)
        # What a row's children say of each voice's correction.
        self._sums = torch.zeros(
            max_num_reqs, self._mixture.slopes.shape[0], NUM_SUMS, device=device
        )

    def reset(self, slot: int) -> None:
        """Another request took the slot: there is no tree, and none to learn from."""
        self._trees.reset(slot)
        self._merged.num_nodes[slot].fill_(0)

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
            target.copy_(pinned(source, self._device), non_blocking=True)

    def forget(self, proposer: int, num_reqs: int) -> None:
        """This proposer suggests nothing this step."""
        self.candidates.num_candidates[proposer, :num_reqs] = 0

    def learn(
        self,
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        num_emitted: torch.Tensor,  # [num_reqs] int32, tokens said since the last build
        token_ids: torch.Tensor,  # [max_num_reqs, max_num_tokens] int, whole texts
        num_tokens: torch.Tensor,  # [max_num_reqs] int32, of each slot's text
    ) -> None:
        """Compare the slots' last candidates with what the target said."""
        merged, mixture = self._merged, self._mixture
        sums = self._sums[: slots.shape[0]]
        self._kernels.tally_candidates(
            slots,
            merged.token_ids,
            merged.parents,
            merged.proposers,
            merged.own_scores,
            merged.num_nodes,
            merged.sibling_bits,
            mixture.slopes,
            mixture.offsets,
            token_ids,
            num_tokens,
            num_emitted,
            sums,
        )
        self._kernels.learn_mixture(
            sums, mixture.slopes, mixture.offsets, mixture.memory
        )

    def build(
        self,
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        num_sampled: torch.Tensor,  # [num_reqs] int32, 0: no token to continue
        max_nodes: torch.Tensor,  # [max_num_reqs] int32, of each slot, root excluded
        chain_only: torch.Tensor,  # [max_num_reqs] int32, 1: keep the best path only
        *,
        num_nodes: int,
        is_drawn: torch.Tensor | None = None,  # [num_reqs] bool
    ) -> torch.Tensor:
        """Replace the slots' trees.

        Args:
            num_nodes: of any tree at most, root excluded.
            is_drawn: rows for which the first proposer drew its candidates. They come
                first, in their order, whatever they are: choosing would bias them.

        Returns:
            ``[num_reqs, max_num_nodes - 1]`` int64 draft tokens in node order, root
            excluded; unused columns hold a valid id.
        """
        merged, trees = self._merged, self._trees
        self._merge(slots)
        self._kernels.rate_candidates(
            slots,
            merged.parents,
            merged.proposers,
            merged.own_scores,
            merged.num_nodes,
            merged.sibling_bits,
            self._mixture.slopes,
            self._mixture.offsets,
            is_drawn,
            merged.scores,
        )
        # Allocated anew: vLLM may still copy the last step's drafts to the host.
        draft_tokens = torch.empty(
            slots.shape[0],
            trees.parents.shape[1] - 1,
            dtype=torch.int64,
            device=self._device,
        )
        self._kernels.select_nodes(
            slots,
            merged.token_ids,
            merged.parents,
            merged.scores,
            merged.proposers,
            merged.num_nodes,
            max_nodes,
            chain_only,
            num_sampled,
            num_nodes,
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

    def num_likely(
        self,
        slots: torch.Tensor,  # [num_reqs] int64
        min_probability: float,
    ) -> torch.Tensor:  # [num_reqs] int64
        """Of each slot's last candidates, how many are as likely to be accepted.

        Trees begin with their likeliest nodes, so as many of a tree's are.
        """
        merged = self._merged
        scores = merged.scores[slots]
        columns = torch.arange(scores.shape[1], device=scores.device)
        is_likely = scores.exp() >= min_probability
        is_likely &= columns < merged.num_nodes[slots, None]
        return is_likely.sum(1)

    def _merge(self, slots: torch.Tensor) -> None:
        """One tree of all candidates, and each proposer's own scores of its nodes."""
        rows = slice(slots.shape[0])
        candidates, merged = self.candidates, self._merged
        self._kernels.merge_candidates(
            slots,
            candidates.token_ids[:, rows],
            candidates.parents[:, rows],
            candidates.scores[:, rows],
            candidates.num_candidates[:, rows],
            merged.token_ids,
            merged.parents,
            merged.proposers,
            merged.own_scores,
            merged.num_nodes,
            merged.sibling_bits,
        )
