"""The draft tree: the one noun every verb passes along."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MASK_BITS = 32  # tree nodes per int32 mask word


def num_mask_words(num_nodes: int) -> int:
    """Words of an ancestor mask over ``num_nodes`` nodes, root included."""
    return -(-num_nodes // MASK_BITS)


@dataclass(frozen=True, slots=True)
class TreeBuffers:
    """Draft trees on the device, one row per request slot.

    Index spaces: ``slot`` is a request's persistent row, ``node`` a position in a
    tree's order. Node 0 is the root (the newest committed token), parents precede
    their children and better nodes come first, so that any prefix of the node order
    is a valid tree.
    """

    token_ids: torch.Tensor  # [max_num_reqs, max_num_nodes] int32, column 0 unused
    parents: torch.Tensor  # [max_num_reqs, max_num_nodes] int32, root -1
    depths: torch.Tensor  # [max_num_reqs, max_num_nodes] int32, root 0
    masks: torch.Tensor  # [max_num_reqs, max_num_nodes, words] int32, bit j: node j
    proposers: torch.Tensor  # [max_num_reqs, max_num_nodes] int32, bit per proposer
    num_nodes: (
        torch.Tensor
    )  # [max_num_reqs] int32, root included, stale columns past it

    @classmethod
    def allocate(
        cls, max_num_reqs: int, max_num_nodes: int, device: torch.device
    ) -> TreeBuffers:
        """Trees of the root alone. ``max_num_nodes`` includes the root."""
        shape = (max_num_reqs, max_num_nodes)
        words = num_mask_words(max_num_nodes)

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(
            token_ids=zeros(*shape),
            parents=torch.full(shape, -1, dtype=torch.int32, device=device),
            depths=zeros(*shape),
            masks=zeros(*shape, words),
            proposers=zeros(*shape),
            num_nodes=torch.ones(max_num_reqs, dtype=torch.int32, device=device),
        )

    def reset(self, slot: int) -> None:
        """The slot holds the root alone: whatever is verified there is rejected."""
        self.num_nodes[slot].fill_(1)
