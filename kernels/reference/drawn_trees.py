"""The rules that verify drawn children, decision by decision.

A rule sees one tree and asks for every random choice, so that the same code decides
with Philox numbers in the twins and is enumerated over all outcomes in the tests.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_treespec.kernels.reference.philox import uniform

Probabilities = NDArray[np.float64]


class Tree(Protocol):
    """One request's tree, node 0 the root."""

    def token(self, node: int) -> int: ...

    def drawn_children(self, node: int) -> list[int]:
        """In the order in which they were drawn."""
        ...

    def fixed_child(self, node: int, token: int) -> int | None:
        """The first child with the token that was not drawn."""
        ...

    def target(self, node: int) -> Probabilities: ...

    def draft(self, node: int) -> Probabilities:
        """What the drawn children of a node that has some were drawn from."""
        ...


class Chance(Protocol):
    """Random choices, each made at most once per node."""

    def accepts(self, node: int, probability: float) -> bool: ...

    def picks(self, node: int, weights: Probabilities) -> int: ...


# Nodes on the path, root included, and the tokens behind each of them.
Walk = tuple[list[int], list[int]]
Rule = Callable[[Tree, Chance], Walk]


def normalised(weights: Probabilities) -> Probabilities:
    """The distribution in proportion to the weights; zero if they all are."""
    total = weights.sum()
    return weights / total if total > 0 else weights


def without(probabilities: Probabilities, token: int) -> Probabilities:
    rest = probabilities.copy()
    rest[token] = 0
    return normalised(rest)


def pick_from(
    tree: Tree, chance: Chance, node: int, residual: Probabilities
) -> tuple[int, int | None]:
    """The token behind a node none of whose draws is accepted, and its fixed child."""
    weights = residual if residual.sum() > 0 else tree.target(node)
    token = chance.picks(node, weights)
    return token, tree.fixed_child(node, token)


def reject_in_turn(
    tree: Tree,
    chance: Chance,
    node: int,
    after_rejection: Callable[[Probabilities, int], Probabilities],  # of q, by a token
) -> tuple[int, int | None]:
    """The token behind a node and the child that carries it."""
    residual = tree.target(node)
    children = tree.drawn_children(node)
    draft = tree.draft(node) if children else residual
    for child in children:
        token = tree.token(child)
        if draft[token] <= 0:
            continue  # nothing can have drawn it
        if chance.accepts(child, min(1.0, residual[token] / draft[token])):
            return token, child
        residual = normalised((residual - draft).clip(min=0))
        draft = after_rejection(draft, token)
    return pick_from(tree, chance, node, residual)


def recursive_rejection(tree: Tree, chance: Chance) -> Walk:
    return _walk_down(tree, chance, without)


def multi_step(tree: Tree, chance: Chance) -> Walk:
    return _walk_down(tree, chance, lambda draft, token: draft)


def _walk_down(
    tree: Tree,
    chance: Chance,
    after_rejection: Callable[[Probabilities, int], Probabilities],
) -> Walk:
    path, tokens = [0], []
    while True:
        token, child = reject_in_turn(tree, chance, path[-1], after_rejection)
        tokens.append(token)
        if child is None:
            return path, tokens
        path.append(child)


def traversal(tree: Tree, chance: Chance) -> Walk:
    path, tokens = [0], []
    while True:
        # A node reached by a fixed child is the root of a tree of draws of its own.
        accepted, residual, _ = climb(tree, chance, path[-1], 1.0)
        assert accepted, "the root's acceptance is 1"
        path += accepted[1:]
        tokens += [tree.token(node) for node in accepted[1:]]
        token, child = pick_from(tree, chance, path[-1], residual)
        tokens.append(token)
        if child is None:
            return path, tokens
        path.append(child)


def climb(
    tree: Tree, chance: Chance, node: int, acceptance: float
) -> tuple[list[int], Probabilities, float]:
    """The accepted path from ``node`` down, empty if the node is rejected, with the
    residual of its last node."""
    residual = tree.target(node)
    children = tree.drawn_children(node)
    draft = tree.draft(node) if children else residual
    for child in children:
        token = tree.token(child)
        if draft[token] <= 0:
            continue  # nothing can have drawn it
        ratio = acceptance * residual[token] / draft[token]
        path, below, _ = climb(tree, chance, child, min(1.0, ratio))
        if path:
            return [node, *path], below, acceptance
        excess = (acceptance * residual - draft).clip(min=0)
        residual, total = normalised(excess), float(excess.sum())
        if acceptance < 1:
            acceptance = total / (total + 1 - acceptance)
        draft = without(draft, token)
    if acceptance >= 1 or chance.accepts(node, acceptance):
        return [node], residual, acceptance
    return [], residual, acceptance


class PhiloxChance:
    """The kernels' numbers: a seed, the root's position and twice the node, plus one
    for a pick."""

    def __init__(self, seed: int, position: int) -> None:
        self.key = torch.tensor(seed), torch.tensor(position)

    def _number(self, use: int) -> float:
        return float(uniform(*self.key, torch.tensor(use)))

    def accepts(self, node: int, probability: float) -> bool:
        return self._number(2 * node) < probability

    def picks(self, node: int, weights: Probabilities) -> int:
        """By the inverse CDF; only tokens of positive weight."""
        possible = np.flatnonzero(weights > 0)
        if not len(possible):
            return 0
        sums = weights[possible].cumsum()
        goal = self._number(2 * node + 1) * sums[-1]
        place = int(np.searchsorted(sums, goal, side="right"))
        return int(possible[min(place, len(possible) - 1)])


class BatchTree:
    """One row of a batch, as the kernels get it."""

    def __init__(
        self,
        parents: list[int],
        token_ids: list[int],
        drawn: list[int],
        sources: list[int],
        target_logits: torch.Tensor,  # [nodes, vocab_size] float32
        draft_logits: torch.Tensor,  # [max_num_sources, vocab_size]
        temperature: float,
    ) -> None:
        self.parents, self.token_ids = parents, token_ids
        self.is_drawn, self.sources = drawn, sources
        self.target_logits, self.draft_logits = target_logits, draft_logits
        self.temperature = temperature

    def token(self, node: int) -> int:
        return self.token_ids[node]

    def _children(self, node: int, drawn: bool) -> list[int]:
        later = range(node + 1, len(self.parents))
        children = [child for child in later if self.parents[child] == node]
        return [child for child in children if bool(self.is_drawn[child]) == drawn]

    def drawn_children(self, node: int) -> list[int]:
        return self._children(node, True) if self.sources[node] >= 0 else []

    def fixed_child(self, node: int, token: int) -> int | None:
        children = self._children(node, False)
        return next((c for c in children if self.token_ids[c] == token), None)

    def target(self, node: int) -> Probabilities:
        return _softmax(self.target_logits[node])

    def draft(self, node: int) -> Probabilities:
        return _softmax(
            self.draft_logits[self.sources[node]].float() / self.temperature
        )


def _softmax(logits: torch.Tensor) -> Probabilities:
    # In float32, so that what underflows in the kernels does so here.
    probabilities = logits.float().softmax(-1).nan_to_num(0.0).double()
    result: Probabilities = probabilities.cpu().numpy()
    return result


def walk_rows(
    rule: Rule,
    slots: torch.Tensor,
    cu_num_logits: torch.Tensor,
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor,
    sources: torch.Tensor,
    drawn: torch.Tensor,
    temperatures: torch.Tensor,
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    sampled: torch.Tensor,
    num_sampled: torch.Tensor,
    path_nodes: torch.Tensor,
    path_lengths: torch.Tensor,
) -> None:
    """Apply a rule to every row of the batch, with the kernels' numbers."""
    cu_logits = cu_num_logits.tolist()
    for row, slot in enumerate(slots.tolist()):
        sampled[row] = path_nodes[row] = 0
        num_sampled[row] = path_lengths[row] = 0
        first, end = cu_logits[row : row + 2]
        if end == first:
            continue
        usable = max(min(end - first, int(num_nodes[slot])), 1)
        tree = BatchTree(
            parents[slot, :usable].tolist(),
            token_ids[slot, :usable].tolist(),
            drawn[slot, :usable].tolist(),
            sources[slot, :usable].tolist(),
            target_logits[first:end],
            draft_logits,
            float(temperatures[slot]),
        )
        chance = PhiloxChance(int(seeds[slot]), int(positions[row]))
        path, tokens = rule(tree, chance)
        sampled[row, : len(tokens)] = torch.tensor(tokens)
        path_nodes[row, : len(path)] = torch.tensor(path)
        num_sampled[row] = len(tokens)
        path_lengths[row] = len(path) - 1
