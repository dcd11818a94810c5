"""The form of a draft tree, decided before anyone knows its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class TreeTemplate:
    """Which of a draft's choices become nodes; the root is not one of them.

    Nodes are in breadth-first order: level by level, siblings side by side, the
    likeliest first.
    """

    parents: tuple[int, ...]  # per node, -1: child of the root
    ranks: tuple[int, ...]  # per node, 0: the draft's most likely child of that parent

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        if not self.parents:
            yield "parents=(): a template has at least one node"
        if len(self.ranks) != len(self.parents):
            yield f"{len(self.ranks)} ranks for {len(self.parents)} parents: one each"
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                yield f"parents[{node}]={parent}: must be in [-1, {node - 1}]"
        for node, (before, parent) in enumerate(pairwise(self.parents), start=1):
            # Non-decreasing parents are what makes an order breadth-first.
            if parent < before:
                yield f"parents[{node}]={parent}: must be >= {before}, the one before"
        num_siblings = dict.fromkeys(self.parents, 0)
        for node, (parent, rank) in enumerate(
            zip(self.parents, self.ranks, strict=True)
        ):
            if rank != num_siblings[parent]:
                yield (
                    f"ranks[{node}]={rank}: must be {num_siblings[parent]}, the next "
                    f"child of node {parent}"
                )
            num_siblings[parent] += 1

    @classmethod
    def from_branching(cls, branching: Sequence[int]) -> TreeTemplate:
        """SpecInfer's ``<k1, k2, ...>`` (arXiv:2305.09781): every node of level
        ``i - 1`` has ``k_i`` children.

        Raises:
            ValueError: naming the level without children.
        """
        parents: list[int] = []
        ranks: list[int] = []
        above = [-1]
        for level, num_children in enumerate(branching):
            if num_children < 1:
                raise ValueError(f"branching[{level}]={num_children}: must be >= 1")
            first = len(parents)
            for parent in above:
                parents += [parent] * num_children
                ranks += range(num_children)
            above = list(range(first, len(parents)))
        return cls(tuple(parents), tuple(ranks))

    @property
    def num_nodes(self) -> int:
        """Draft nodes, root excluded."""
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Level of every node, 1 for the root's children."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return self.depths[-1]
