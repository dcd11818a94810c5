"""Observe: was it worth it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths

MAX_RANK = 8  # children from here on are counted together


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What one step's verification came to. Slots without a tree count as the root."""

    verified: torch.Tensor  # [num_reqs] int64, nodes verified, root excluded
    lengths: torch.Tensor  # [num_reqs] int64, accepted nodes, root excluded
    by_rank: torch.Tensor  # [MAX_RANK + 1] int64, accepted nodes, 0: first child
    drafted: torch.Tensor  # [num_proposers] int64, verified nodes it proposed
    accepted: torch.Tensor  # [num_proposers] int64, of them, those on the path
    exclusive: torch.Tensor  # [num_proposers] int64, of them, nobody else's

    def to_host(self) -> StepCounts:
        """The same in host memory, once what the device does before this is done."""
        parts = [getattr(self, field.name) for field in fields(self)]
        packed = torch.cat(parts)
        # Allocated anew: the last step's may not have been read yet.
        copied = torch.empty_like(packed, device="cpu", pin_memory=packed.is_cuda)
        copied.copy_(packed, non_blocking=True)
        return StepCounts(*torch.split(copied, [part.shape[0] for part in parts]))


def count_step(
    trees: TreeBuffers,
    paths: AcceptedPaths,
    slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32, rows verified, root included
    num_proposers: int,
) -> StepCounts:
    """Count a verified step; before its trees are replaced. Waits for nothing."""
    num_reqs = slots.shape[0]
    # Of a tree, as much is verified as was scheduled; what else was scheduled is padding.
    rows = torch.minimum(trees.num_nodes[slots], cu_num_logits.diff())
    verified = (rows.long() - 1).clamp_(min=0)
    columns = torch.arange(trees.parents.shape[1], device=slots.device)
    is_node = (columns > 0) & (columns <= verified[:, None])
    path = paths.nodes[:num_reqs].long()  # [num_reqs, max_num_nodes], root first
    lengths = paths.lengths[:num_reqs].long()
    on_path = columns[1:] <= lengths[:, None]  # of path[:, 1:]
    bits = trees.proposers[slots]
    own = 1 << torch.arange(num_proposers, device=slots.device, dtype=bits.dtype)
    is_own = (bits[:, :, None] & own) != 0
    path_is_own = (bits.gather(1, path)[:, 1:, None] & own) != 0
    return StepCounts(
        verified=verified,
        lengths=lengths,
        by_rank=_count_ranks(trees.parents[slots], is_node, path, on_path),
        drafted=(is_own & is_node[:, :, None]).sum((0, 1)),
        accepted=(path_is_own & on_path[:, :, None]).sum((0, 1)),
        exclusive=marginal_acceptance(bits, path, lengths, num_proposers),
    )


def _count_ranks(
    parents: torch.Tensor,  # [num_reqs, max_num_nodes] int32, stale where no node
    is_node: torch.Tensor,  # [num_reqs, max_num_nodes] bool
    path: torch.Tensor,  # [num_reqs, max_num_nodes] int64, root first
    on_path: torch.Tensor,  # [num_reqs, max_num_nodes - 1] bool, of path[:, 1:]
) -> torch.Tensor:  # [MAX_RANK + 1] int64
    """Accepted nodes by how many better siblings they have."""
    num_reqs, num_columns = parents.shape
    of = parents.long().clamp_(min=0)
    # Node -> its child on the path; one column more takes what is behind the path.
    taken = path.new_zeros(num_reqs, num_columns + 1)
    taken.scatter_(1, torch.where(on_path, path[:, :-1], num_columns), path[:, 1:])
    columns = torch.arange(num_columns, device=path.device)
    is_better = is_node & (columns < taken.gather(1, of))
    num_better = torch.zeros_like(path).scatter_add_(1, of, is_better.long())
    ranks = num_better.gather(1, path[:, :-1]).clamp_(max=MAX_RANK)
    counted = torch.arange(MAX_RANK + 1, device=path.device)
    return ((ranks[:, :, None] == counted) & on_path[:, :, None]).sum((0, 1))


def marginal_acceptance(
    proposers: torch.Tensor,  # [num_reqs, max_num_nodes] int32, per node a bit per one
    nodes: torch.Tensor,  # [num_reqs, max_num_nodes] int32, accepted path, root first
    lengths: torch.Tensor,  # [num_reqs] int32, accepted nodes, root excluded
    num_proposers: int,
) -> torch.Tensor:  # [num_proposers] int64
    """Accepted nodes that would have been lost without each proposer.

    A path ends at the first node that nobody else proposed, so what follows is lost
    with it, whoever else proposed that.
    """
    bits = proposers.gather(1, nodes.long())[:, 1:, None]
    depths = torch.arange(1, nodes.shape[1], device=nodes.device)
    accepted = (depths <= lengths[:, None])[:, :, None]
    own = 1 << torch.arange(num_proposers, device=nodes.device, dtype=bits.dtype)
    by_others = accepted & (bits & ~own != 0)
    kept = by_others.cumprod(1).sum(1)
    return (lengths[:, None] - kept).sum(0)


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
