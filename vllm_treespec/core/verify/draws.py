"""What drawn children need to be verified: where they were drawn from, and how.

Walking the target's own picks is lossless for any tree, but throws away what is known
about a child that the draft sampled: with which probability. The rules beside this
file accept such children more often. Fixed children, which some proposer named without
chance, take part in every rule: the token that follows a node whose drawn children
were all turned down comes from what is left of the target, so whichever fixed child
carries it is accepted.

A tree may be cut to any prefix of its nodes, but which nodes it has must not depend on
tokens that were drawn for them or for their later siblings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths


@dataclass(frozen=True, slots=True)
class Draws:
    """How the drawn nodes of every slot's tree came about.

    Siblings were drawn in node order, each from ``softmax(draft_logits / temperature)``
    of their parent's source.
    """

    draft_logits: (
        torch.Tensor
    )  # [max_num_sources, vocab_size] float, any of 16, 32 bits
    sources: torch.Tensor  # [max_num_reqs, max_num_nodes] int32, row of draft_logits
    # that a node's drawn children came from, -1: it has none
    drawn: torch.Tensor  # [max_num_reqs, max_num_nodes] int32, 1: drawn, 0: fixed
    temperatures: torch.Tensor  # [max_num_reqs] float32, > 0
    seeds: torch.Tensor  # [max_num_reqs] int64, of the rules' own random numbers

    @classmethod
    def allocate(
        cls,
        max_num_reqs: int,
        max_num_nodes: int,
        max_num_sources: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Draws:
        """No node is drawn."""
        shape = (max_num_reqs, max_num_nodes)
        return cls(
            draft_logits=torch.zeros(
                max_num_sources, vocab_size, dtype=dtype, device=device
            ),
            sources=torch.full(shape, -1, dtype=torch.int32, device=device),
            drawn=torch.zeros(shape, dtype=torch.int32, device=device),
            temperatures=torch.ones(max_num_reqs, device=device),
            seeds=torch.zeros(max_num_reqs, dtype=torch.int64, device=device),
        )


@dataclass(frozen=True, slots=True)
class DrawnRule:
    """One of the rules beside this file."""

    kernel: str  # its name in ``KernelSet``

    def __call__(
        self,
        kernels: KernelSet,
        trees: TreeBuffers,
        draws: Draws,
        paths: AcceptedPaths,  # written, rows in batch order
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32
        target_logits: torch.Tensor,  # [num_logits, vocab_size] float32, processed
        positions: torch.Tensor,  # [num_reqs] int64, of every row's root
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Emitted tokens and their count, as ``walk_target`` returns them.

        Greedy is a target that leaves one token possible (the others at ``-inf``).
        """
        num_reqs = slots.shape[0]
        sampled = torch.empty(
            num_reqs, paths.nodes.shape[1], dtype=torch.int64, device=slots.device
        )
        num_sampled = torch.empty_like(slots, dtype=torch.int32)
        getattr(kernels, self.kernel)(
            slots,
            cu_num_logits,
            target_logits,
            draws.draft_logits,
            draws.sources,
            draws.drawn,
            draws.temperatures,
            trees.token_ids,
            trees.parents,
            trees.num_nodes,
            draws.seeds,
            positions,
            sampled,
            num_sampled,
            paths.nodes,
            paths.lengths,
        )
        return sampled, num_sampled
