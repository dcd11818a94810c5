"""Observe: was it worth it?"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
