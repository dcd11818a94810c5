"""Verify by walking the target's own choices: lossless for any fixed tree.

The target picks a token at every node exactly as it would without speculation, greedy
or sampled. From the root, while the picked token is one of the node's children, the
walk goes on there; the first pick that no child carries is the bonus token. Nothing
about the tree influences a pick, so the emitted tokens have the target's distribution.
(SpecInfer, arXiv:2305.09781, calls the greedy case VerifyGreedy.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.tree import TreeBuffers


@dataclass(frozen=True, slots=True)
class AcceptedPaths:
    """The way the target took through each row's tree, for commit to follow."""

    nodes: torch.Tensor  # [max_num_reqs, max_num_nodes] int32, column 0 is the root
    lengths: torch.Tensor  # [max_num_reqs] int32, accepted nodes, root excluded

    @classmethod
    def allocate(
        cls, max_num_reqs: int, max_num_nodes: int, device: torch.device
    ) -> AcceptedPaths:
        return cls(
            nodes=torch.zeros(
                max_num_reqs, max_num_nodes, dtype=torch.int32, device=device
            ),
            lengths=torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
        )

    def of(self, rows: slice) -> AcceptedPaths:
        """Those rows' share."""
        return AcceptedPaths(self.nodes[rows], self.lengths[rows])


def walk_target(
    kernels: KernelSet,
    trees: TreeBuffers,
    paths: AcceptedPaths,  # written, rows in batch order
    slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32
    target_ids: torch.Tensor,  # [num_logits] int64, the target's pick at every node
    counts: torch.Tensor | None = None,  # written, see ``StepCounts``
) -> tuple[torch.Tensor, torch.Tensor]:
    """Emitted tokens ``[num_reqs, max_num_nodes]`` int64 and their count ``[num_reqs]``
    int32, both allocated anew: another stream may still copy the last step's."""
    num_reqs = slots.shape[0]
    sampled = target_ids.new_empty(num_reqs, paths.nodes.shape[1])
    num_sampled = torch.empty_like(slots, dtype=torch.int32)
    kernels.walk_tree(
        slots,
        cu_num_logits,
        target_ids,
        trees.token_ids,
        trees.parents,
        trees.num_nodes,
        sampled,
        num_sampled,
        paths.nodes,
        paths.lengths,
        trees.proposers,
        counts,
    )
    return sampled, num_sampled


def cut_paths(
    paths: AcceptedPaths,  # cut in place
    sampled: torch.Tensor,  # [num_reqs, max_num_nodes] int64, cut in place
    num_sampled: torch.Tensor,  # [num_reqs] int32, cut in place
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32
    invalid_nodes: torch.Tensor,  # [num_logits] bool, nodes that must not be accepted
) -> None:
    """End every path before its first invalid node, whose token was the next pick.

    Cutting is lossless: the pick after the last kept node becomes the bonus token.
    """
    num_reqs, max_num_nodes = sampled.shape
    rows = cu_num_logits[:-1, None] + paths.nodes[:num_reqs]
    on_path = (
        torch.arange(max_num_nodes, device=sampled.device)
        <= paths.lengths[:num_reqs, None]
    )
    rows = torch.where(on_path, rows, cu_num_logits[:-1, None])
    # The root is never invalid, so a running sum of zero means "before the first".
    valid = on_path & (torch.cumsum(invalid_nodes[rows], dim=1) == 0)
    kept = valid.sum(dim=1, dtype=torch.int32)
    paths.lengths[:num_reqs] = kept - 1
    num_sampled.copy_(kept)
    sampled.masked_fill_(~valid, 0)
