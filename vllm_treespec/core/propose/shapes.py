"""Which nodes of a draft tree are expanded, level by level, in static shapes.

A level's *rows* are the nodes that the draft model runs on: the root at level 0, the
frontier later. Each row draws its most likely children, *kept* ones become candidates,
and some of those are the next level's rows.
"""

from __future__ import annotations

from typing import Protocol

import torch

from vllm_treespec.core.propose.template import TreeTemplate

# Beside the drawn child of a node that mixes. A choice: with 1, 2 or 3 the bundled pair
# accepts alike, within the noise.
NUM_FIXED = 3


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

    @property
    def num_planned(self) -> int:
        """Children that stay on all levels together."""

    def num_fixed(self, level: int) -> int:
        """Children of a row that are its likeliest if it mixes: one more is drawn."""

    def next_rows(self, level: int, scores: torch.Tensor) -> torch.Tensor:
        """The next level's rows among the kept children.

        Args:
            scores: ``[num_reqs, num_kept]`` float32, log-probability of the path.

        Returns:
            ``[num_reqs, num_rows[level + 1]]`` int64 into the kept children.
        """

    def planned_rows(self, level: int) -> torch.Tensor:
        """The next level's rows where children are drawn: ``[num_rows[level + 1]]``.

        By the order of drawing: how likely a drawn token was says little of whether
        the target accepts it, and expanding likely ones accepts a fifth less.
        """


class BestFirst:
    """Expands the likeliest paths of every level (EAGLE-2, arXiv:2406.16858; OPT-Tree,
    arXiv:2406.17276; SpecExec, arXiv:2406.02532, for a global pool)."""

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        num_children: int,
        device: torch.device,
        drawn: TreeTemplate | None = None,
    ) -> None:
        """
        Args:
            drawn: the tree where children are drawn, as far as it fits; None: all of
                the first rows' children.
        """
        num_rows = [1]
        while len(num_rows) < depth:
            num_rows.append(min(width, num_rows[-1] * num_children))
        self.num_rows = tuple(num_rows)
        self.num_children = (num_children,) * depth
        self._device = device
        self.num_planned = 0
        self._planned: list[torch.Tensor] = []
        self._planned_rows: list[torch.Tensor] = []
        nodes = [-1]  # of the template in this level's rows, -1: the root
        for level, count in enumerate(num_rows):
            kept = _children_in_rows(drawn, nodes[:count], num_children)
            places = range(count * num_children)
            stays = [drawn is None or place in kept for place in places]
            self.num_planned += sum(stays)
            self._planned.append(torch.tensor(stays, device=device))
            if level + 1 == depth:
                break
            expanded = [
                place
                for place, node in kept.items()
                if drawn is not None and node in drawn.parents
            ]
            nodes = [kept[place] for place in expanded]
            # Rows that the plan does not need run on children that are not kept.
            spare = [place for place in places if place not in expanded]
            rows = (expanded + spare)[: num_rows[level + 1]]
            self._planned_rows.append(torch.tensor(rows, device=device))

    def kept(self, level: int) -> torch.Tensor:
        count = self.num_rows[level] * self.num_children[level]
        return torch.arange(count, device=self._device)

    def planned(self, level: int) -> torch.Tensor:
        return self._planned[level]

    def num_fixed(self, level: int) -> int:
        return min(NUM_FIXED, self.num_children[level] - 1)

    def next_rows(self, level: int, scores: torch.Tensor) -> torch.Tensor:
        return scores.topk(self.num_rows[level + 1], dim=1).indices

    def planned_rows(self, level: int) -> torch.Tensor:
        return self._planned_rows[level]


class FixedShape:
    """Grows the same tree every step, whatever the draft model's probabilities."""

    def __init__(self, template: TreeTemplate, device: torch.device) -> None:
        self.num_planned = len(template.parents)
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

    def num_fixed(self, level: int) -> int:
        return self.num_children[level] - 1

    def next_rows(self, level: int, scores: torch.Tensor) -> torch.Tensor:
        return self._next_rows[level].expand(scores.shape[0], -1)

    def planned_rows(self, level: int) -> torch.Tensor:
        return self._next_rows[level]


def _children_in_rows(
    template: TreeTemplate | None, nodes: list[int], num_children: int
) -> dict[int, int]:
    """Place among a level's children -> node of the template, for these rows' nodes."""
    if template is None:
        return {}
    return {
        row * num_children + template.ranks[child]: child
        for row, node in enumerate(nodes)
        for child, parent in enumerate(template.parents)
        if parent == node and template.ranks[child] < num_children
    }
