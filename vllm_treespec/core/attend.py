"""Attend: what does a node see, and from where?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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


@dataclass(frozen=True, slots=True)
class CausalTail:
    """The requests at the end of a batch that have no tree, as the host knows them.

    Their rows are plainly causal, so any attention kernel can serve them.
    """

    reqs: slice  # batch rows
    tokens: slice  # query rows
    query_start_loc: torch.Tensor  # [num_reqs of it + 1] int32, from 0
    max_query_len: int
    max_num_keys: int
    max_query_len_before: int  # of the batch's other requests, 0: there are none


def causal_tail(
    cu_num_logits: npt.NDArray[
        np.int32
    ],  # [num_reqs + 1], nodes per row, root included
    query_start_loc_np: npt.NDArray[np.int32],  # [>= num_reqs + 1]
    query_start_loc: torch.Tensor,  # the same on the device
    max_num_keys: npt.NDArray[np.int32],  # [>= num_reqs], upper bounds
) -> CausalTail | None:
    """The requests behind the last one with a tree; None if they only decode.

    vLLM sorts requests with drafts to the front.
    """
    num_reqs = len(cu_num_logits) - 1
    with_tree = np.flatnonzero(np.diff(cu_num_logits) > 1)
    first = int(with_tree[-1]) + 1 if with_tree.size else 0
    query_lens = np.diff(query_start_loc_np[: num_reqs + 1])
    longest = int(query_lens[first:].max(initial=0))
    if longest <= 1:
        return None
    begin = int(query_start_loc_np[first])
    return CausalTail(
        reqs=slice(first, num_reqs),
        tokens=slice(begin, int(query_start_loc_np[num_reqs])),
        query_start_loc=query_start_loc[first : num_reqs + 1] - begin,
        max_query_len=longest,
        max_num_keys=int(max_num_keys[first:num_reqs].max()),
        max_query_len_before=int(query_lens[:first].max(initial=0)),
    )
