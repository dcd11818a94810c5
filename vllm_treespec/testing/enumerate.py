"""The exact distribution of what a rule emits, over every draw and every decision.

A rule asks for its random choices one by one. Running it again and again, each time
with the next unexplored outcomes, visits every course it can take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vllm_treespec.kernels.reference.drawn_trees import Probabilities, Rule

# What follows a context of tokens, by the target or by the draft.
Model = Callable[[tuple[int, ...]], Probabilities]


class Outcomes:
    """One course: the choices to repeat, then the first possible one each time."""

    def __init__(self) -> None:
        self.choices: list[tuple[int, list[int]]] = []  # taken, and those left to try
        self.probability = 1.0
        self._place = 0

    def choose(self, probabilities: Probabilities) -> int:
        if self._place == len(self.choices):
            first, *rest = np.flatnonzero(probabilities).tolist()
            self.choices.append((first, rest))
        choice, _ = self.choices[self._place]
        self._place += 1
        self.probability *= float(probabilities[choice])
        return choice

    def accepts(self, node: int, probability: float) -> bool:
        return self.choose(np.array([1 - probability, probability])) == 1

    def picks(self, node: int, weights: Probabilities) -> int:
        return self.choose(weights / weights.sum())

    def next(self) -> bool:
        """Start over with the next course; False: that was the last one."""
        self.probability, self._place = 1.0, 0
        while self.choices:
            _, rest = self.choices.pop()
            if rest:
                self.choices.append((rest[0], rest[1:]))
                return True
        return False


@dataclass(frozen=True, slots=True)
class Shape:
    """Which nodes a tree has, before any token is drawn."""

    parents: tuple[int, ...]  # root -1
    drawn: tuple[bool, ...]

    def children(self, node: int, drawn: bool) -> list[int]:
        edges = enumerate(zip(self.parents, self.drawn, strict=True))
        return [
            child
            for child, (parent, is_drawn) in edges
            if parent == node and is_drawn == drawn
        ]


# A node's next drawn child, from its draft and the tokens drawn before.
Draw = Callable[[Probabilities, list[int], Outcomes], int]


def draw_without_replacement(
    draft: Probabilities, siblings: list[int], outcomes: Outcomes
) -> int:
    rest = draft.copy()
    rest[siblings] = 0
    if rest.sum() > 0:
        return outcomes.choose(rest / rest.sum())
    # The top-k of some noise holds impossible tokens once the possible ones are gone.
    unused = set(range(len(draft))) - set(siblings)
    return min(unused, default=0)


def draw_iid(draft: Probabilities, siblings: list[int], outcomes: Outcomes) -> int:
    return outcomes.choose(draft)


class LazyTree:
    """A tree whose tokens are drawn when a rule looks at them: that is no different
    from drawing them beforehand, and leaves out what never matters."""

    def __init__(
        self,
        shape: Shape,
        target: Model,
        draft: Model,
        draw: Draw,
        outcomes: Outcomes,
    ) -> None:
        self._shape, self._outcomes, self._draw = shape, outcomes, draw
        self._target, self._draft = target, draft
        self._contexts: dict[int, tuple[int, ...]] = {0: ()}

    def _context(self, node: int) -> tuple[int, ...]:
        if node not in self._contexts:
            parent = self._shape.parents[node]
            token = self._new_token(node, parent)
            self._contexts[node] = (*self._context(parent), token)
        return self._contexts[node]

    def _new_token(self, node: int, parent: int) -> int:
        context = self._context(parent)
        if not self._shape.drawn[node]:
            # Any function of the context will do; this one collides with draws.
            return (node + sum(context)) % len(self._target(context))
        siblings = self._shape.children(parent, True)
        drawn = [self.token(child) for child in siblings[: siblings.index(node)]]
        return self._draw(self._draft(context), drawn, self._outcomes)

    def token(self, node: int) -> int:
        return self._context(node)[-1]

    def drawn_children(self, node: int) -> list[int]:
        return self._shape.children(node, True)

    def fixed_child(self, node: int, token: int) -> int | None:
        children = self._shape.children(node, False)
        return next((child for child in children if self.token(child) == token), None)

    def target(self, node: int) -> Probabilities:
        return self._target(self._context(node))

    def draft(self, node: int) -> Probabilities:
        return self._draft(self._context(node))


def courses(
    rule: Rule, shape: Shape, target: Model, draft: Model, draw: Draw
) -> Iterator[tuple[float, list[int], list[int]]]:
    """Every course: its probability, the path and the emitted tokens."""
    outcomes = Outcomes()
    while True:
        tree = LazyTree(shape, target, draft, draw, outcomes)
        path, tokens = rule(tree, outcomes)
        yield outcomes.probability, path, tokens
        if not outcomes.next():
            return


def joint(target: Model, vocab_size: int, length: int) -> Probabilities:
    """[vocab_size] * length, the target's distribution of the next tokens."""
    result = np.zeros((vocab_size,) * length)
    for tokens in np.ndindex(result.shape):
        steps = (target(tokens[:place])[tokens[place]] for place in range(length))
        result[tokens] = np.prod(list(steps))
    return result


def emitted(
    rule: Rule,
    shape: Shape,
    target: Model,
    draft: Model,
    draw: Draw,
    vocab_size: int,
    length: int,
) -> tuple[Probabilities, float]:
    """The distribution of the first tokens, as many as in ``joint``, and the mean
    number of accepted nodes. What one step does not emit the target adds."""
    result = np.zeros((vocab_size,) * length)
    num_accepted = 0.0
    goal = joint(target, vocab_size, length)
    for probability, path, tokens in courses(rule, shape, target, draft, draw):
        known = tuple(tokens[:length])
        rest = goal[known]
        total = rest.sum()
        assert total > 0, f"the target cannot say {tokens}"
        result[known] += probability * rest / total
        num_accepted += probability * (len(path) - 1)
    return result, num_accepted


def total_variation(first: Probabilities, second: Probabilities) -> float:
    return float(np.abs(first - second).sum() / 2)
