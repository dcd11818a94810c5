"""Observe: was it worth it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths
from vllm_treespec.kernels.bins import NUM_RANKS

MAX_RANK = NUM_RANKS - 1  # children from here on are counted together


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What one step's verification came to. Slots without a tree count as the root."""

    # [num_reqs, 2 + NUM_RANKS + 3 * num_proposers] int64, see ``count_step``
    counts: torch.Tensor

    @classmethod
    def allocate(
        cls, num_reqs: int, num_proposers: int, device: torch.device
    ) -> StepCounts:
        """To be written by ``walk_target`` or ``count_step``."""
        shape = (num_reqs, 2 + NUM_RANKS + 3 * num_proposers)
        return cls(torch.empty(shape, dtype=torch.int64, device=device))

    @property
    def verified(self) -> torch.Tensor:
        """``[num_reqs]`` nodes verified, root excluded."""
        return self.counts[:, 0]

    @property
    def lengths(self) -> torch.Tensor:
        """``[num_reqs]`` accepted nodes, root excluded."""
        return self.emitted_and_exclusive[:, 0] - 1

    @property
    def by_rank(self) -> torch.Tensor:
        """``[NUM_RANKS]`` accepted nodes, 0: first child."""
        return self.counts[:, 1 : 1 + NUM_RANKS].sum(0)

    @property
    def drafted(self) -> torch.Tensor:
        """``[num_proposers]`` verified nodes it proposed."""
        return self._by_proposer[:, : self._num_proposers].sum(0)

    @property
    def accepted(self) -> torch.Tensor:
        """``[num_proposers]`` of them, those on the path."""
        return self._by_proposer[:, self._num_proposers :].sum(0)

    @property
    def exclusive(self) -> torch.Tensor:
        """``[num_proposers]`` of them, those lost without it."""
        return self.emitted_and_exclusive[:, 1:].sum(0)

    @property
    def emitted_and_exclusive(self) -> torch.Tensor:
        """``[num_reqs, 1 + num_proposers]`` tokens emitted, and the last of the above."""
        return self.counts[:, -1 - self._num_proposers :]

    @property
    def _num_proposers(self) -> int:
        return (self.counts.shape[1] - 2 - NUM_RANKS) // 3

    @property
    def _by_proposer(self) -> torch.Tensor:
        return self.counts[:, 1 + NUM_RANKS : -1 - self._num_proposers]

    def to_host(self) -> StepCounts:
        """The same in host memory, once what the device does before this is done."""
        # Allocated anew: the last step's may not have been read yet.
        pinned = self.counts.is_cuda
        copied = torch.empty_like(self.counts, device="cpu", pin_memory=pinned)
        return StepCounts(copied.copy_(self.counts, non_blocking=True))


def count_step(
    kernels: KernelSet,
    trees: TreeBuffers,
    paths: AcceptedPaths,
    slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32, rows verified, root included
    counts: StepCounts,  # written
) -> None:
    """Count a verified step; before its trees are replaced. Waits for nothing."""
    kernels.count_step(
        slots,
        cu_num_logits,
        trees.num_nodes,
        trees.parents,
        trees.proposers,
        paths.nodes,
        paths.lengths,
        counts.counts,
    )


def accepted_levels(
    proposers: torch.Tensor,  # [num_reqs, max_num_nodes] int32, per node a bit per one
    nodes: torch.Tensor,  # [num_reqs, max_num_nodes] int32, accepted path, root first
    lengths: torch.Tensor,  # [num_reqs] int32, accepted nodes, root excluded
    proposer: int,
) -> torch.Tensor:  # [num_reqs] int64
    """How far down the accepted path all nodes are, among others, this proposer's."""
    bits = proposers.gather(1, nodes.long())[:, 1:]
    depths = torch.arange(1, nodes.shape[1], device=nodes.device)
    is_own = (bits >> proposer & 1).bool() & (depths <= lengths[:, None])
    return is_own.cumprod(1).sum(1)


def walk(
    token_ids: Sequence[int],  # per node; the root's is not looked at
    parents: Sequence[int],  # per node, root -1
    emitted: Sequence[int],  # what the target said after the root
) -> list[int]:
    """Nodes of the accepted path, root excluded."""
    edges = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(parents, token_ids, strict=True))
        if parent >= 0
    }
    path: list[int] = []
    for token in emitted:
        node = edges.get((path[-1] if path else 0, token))
        if node is None:
            break
        path.append(node)
    return path


def draw_tree(
    labels: Sequence[str],  # per node
    parents: Sequence[int],  # per node, root -1, parents before children
    accepted: Sequence[int],  # nodes of the accepted path, root excluded
) -> str:
    """The tree as text, one node a line, ``*`` before accepted nodes."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    on_path = set(accepted)
    lines = [f"  {labels[0]}"]
    stack = [(child, "") for child in reversed(children[0])]
    while stack:
        node, indent = stack.pop()
        last = node == children[parents[node]][-1]
        mark = "*" if node in on_path else " "
        lines.append(f"{mark} {indent}{'`-' if last else '|-'} {labels[node]}")
        deeper = indent + ("   " if last else "|  ")
        stack += [(child, deeper) for child in reversed(children[node])]
    return "\n".join(lines)
