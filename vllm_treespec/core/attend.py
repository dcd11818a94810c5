"""Attend: what does a node see, and from where?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.tree import TreeBuffers, num_mask_words


@dataclass(frozen=True, slots=True)
class BatchTrees:
    """This step's trees in batch order, at addresses that CUDA graphs can keep.

    ``row`` is a request's position in this batch.
    """

    num_nodes: torch.Tensor  # [max_num_reqs] int32, query rows that are tree nodes
    depths: torch.Tensor  # [max_num_reqs, max_num_nodes] int32, root 0
    masks: torch.Tensor  # [max_num_reqs, max_num_nodes, words] int32, bit j: node j
    root_positions: torch.Tensor  # [max_num_reqs] int32, KV index of the root

    @classmethod
    def allocate(
        cls, max_num_reqs: int, max_num_nodes: int, device: torch.device
    ) -> BatchTrees:
        """No trees: every row is causal until ``attach`` ran."""

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(
            num_nodes=zeros(max_num_reqs),
            depths=zeros(max_num_reqs, max_num_nodes),
            masks=zeros(max_num_reqs, max_num_nodes, num_mask_words(max_num_nodes)),
            root_positions=zeros(max_num_reqs),
        )


def attach(
    kernels: KernelSet,
    trees: TreeBuffers,
    batch: BatchTrees,
    slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32, nodes per row, root included
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    positions: torch.Tensor,  # [num_tokens] int64, by index in; by depth out
) -> None:
    """Line the slots' trees up with the batch and give nodes their depth positions.

    KV slots must have been computed from ``positions`` before this call.
    """
    kernels.gather_trees(
        slots,
        cu_num_logits,
        query_start_loc,
        trees.num_nodes,
        trees.depths,
        trees.masks,
        positions,
        batch.num_nodes,
        batch.depths,
        batch.masks,
        batch.root_positions,
    )
