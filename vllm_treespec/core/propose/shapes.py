"""Which nodes of a draft tree are expanded, level by level, in static shapes.

A level's *rows* are the nodes that the draft model runs on: the root at level 0, the
frontier later. Each row draws its most likely children, *kept* ones become candidates,
and some of those are the next level's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_treespec.core.propose.template import TreeTemplate


class Shape(Protocol):
    """How a draft tree grows. Every number is known before the first step."""

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Per level, rows that the draft model runs on."""

    @property
    def num_children(self) -> tuple[int, ...]:
        """Per level, children drawn for each row."""

    def kept(self, level: int) -> torch.Tensor:
        """Children that become candidates: ``[num_kept]`` int64 into the level's
        ``num_rows * num_children`` children, row by row, likeliest first."""

    def planned(self, level: int) -> torch.Tensor:
        """Which of the kept children stay if they are drawn: ``[num_kept]`` bool.

        Decided beforehand, for to choose among drawn children would bias them.
        """

    def next_rows(self, level: int, scores: torch.Tensor) -> torch.Tensor:
        """The next level's rows among the kept children.

        Args:
            scores: ``[num_reqs, num_kept]`` float32, log-probability of the path.

        Returns:
            ``[num_reqs, num_rows[level + 1]]`` int64 into the kept children.
        """


@dataclass(frozen=True, slots=True)
class BestFirst:
    """Expands the likeliest paths of every level (EAGLE-2, arXiv:2406.16858; OPT-Tree,
    arXiv:2406.17276; SpecExec, arXiv:2406.02532, for a global pool)."""

    num_rows: tuple[int, ...]
    num_children: tuple[int, ...]
    plan: tuple[torch.Tensor, ...]  # per level, see ``Shape.planned``
    device: torch.device

    @classmethod
    def of(
        cls,
        *,
        depth: int,
        width: int,
        num_children: int,
        device: torch.device,
        drawn: TreeTemplate | None = None,
    ) -> BestFirst:
        """
        Args:
            drawn: how many children the best, the second best, ... row of a level keeps
                if they are drawn; None keeps all that are drawn.
        """
        rows = [1]
        while len(rows) < depth:
            rows.append(min(width, rows[-1] * num_children))
        plan = []
        for level, num_rows in enumerate(rows):
            counts = [num_children] * num_rows
            if drawn is not None:
                counts = _child_counts(drawn, level)[:num_rows]
                counts += [0] * (num_rows - len(counts))
            stays = [rank < count for count in counts for rank in range(num_children)]
            plan.append(torch.tensor(stays, device=device))
        return cls(tuple(rows), (num_children,) * depth, tuple(plan), device)

    def planned(self, level: int) -> torch.Tensor:
        return self.plan[level]

    def kept(self, level: int) -> torch.Tensor:
        count = self.num_rows[level] * self.num_children[level]
        return torch.arange(count, device=self.device)

    def next_rows(self, level: int, scores: torch.Tensor) -> torch.Tensor:
        return scores.topk(self.num_rows[level + 1], dim=1).indices


class FixedShape:
    """Grows the same tree every step, whatever the draft model's probabilities."""

    def __init__(self, template: TreeTemplate, device: torch.device) -> None:
        nodes_at: list[list[int]] = [[] for _ in range(template.depth)]
        for node, depth in enumerate(template.depths):
            nodes_at[depth - 1].append(node)
        has_children = set(template.parents)
        rows = [-1]  # nodes, -1: the root
        num_rows, num_children = [], []
        self._kept: list[torch.Tensor] = []
        self._next_rows: list[torch.Tensor] = []
        for nodes in nodes_at:
            drawn = 1 + max(template.ranks[node] for node in nodes)
            row_of = {node: row for row, node in enumerate(rows)}
            kept = [
                row_of[template.parents[node]] * drawn + template.ranks[node]
                for node in nodes
            ]
            expanded = [
                place for place, node in enumerate(nodes) if node in has_children
            ]
            num_rows.append(len(rows))
            num_children.append(drawn)
            self._kept.append(torch.tensor(kept, device=device))
            self._next_rows.append(torch.tensor(expanded, device=device))
            rows = [nodes[place] for place in expanded]
        self.num_rows = tuple(num_rows)
        self.num_children = tuple(num_children)

    def kept(self, level: int) -> torch.Tensor:
        return self._kept[level]

    def planned(self, level: int) -> torch.Tensor:
        return torch.ones_like(self._kept[level], dtype=torch.bool)

    def next_rows(self, level: int, scores: torch.Tensor) -> torch.Tensor:
        return self._next_rows[level].expand(scores.shape[0], -1)


def _child_counts(template: TreeTemplate, level: int) -> list[int]:
    """Children of the nodes of a level, most first."""
    counts = [
        template.parents.count(node)
        for node, depth in [(-1, 0), *enumerate(template.depths)]
        if depth == level
    ]
    return sorted(counts, reverse=True)
