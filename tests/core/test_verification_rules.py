"""The rules for drawn children, over every draw and every decision: exactly lossless."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from vllm_treespec.kernels.reference.drawn_trees import (
    Chance,
    Probabilities,
    Rule,
    Tree,
    Walk,
    multi_step,
    recursive_rejection,
    traversal,
)
from vllm_treespec.testing.enumerate import (
    Draw,
    Model,
    Outcomes,
    Shape,
    courses,
    draw_iid,
    draw_without_replacement,
    emitted,
    joint,
    total_variation,
)

RULES = [
    pytest.param(recursive_rejection, draw_without_replacement, id="recursive"),
    pytest.param(multi_step, draw_iid, id="multi-step"),
    pytest.param(traversal, draw_without_replacement, id="traversal"),
]
NUM_TOKENS = 3

P = np.array([0.5, 0.3, 0.15, 0.05])
Q = np.array([0.4, 0.1, 0.3, 0.2])


def flat(num_children: int) -> Shape:
    children = (0,) * num_children
    return Shape((-1, *children), (False, *(True for _ in children)))


def draw_best(draft: Probabilities, siblings: list[int], outcomes: Outcomes) -> int:
    """No draw at all: the draft's likeliest tokens, in order."""
    return int(np.argsort(-draft)[len(siblings) % len(draft)])


def walk_picks(tree: Tree, chance: Chance) -> Walk:
    """The target's own picks, whatever the drawn children are."""
    path, tokens = [0], []
    while True:
        tokens.append(chance.picks(path[-1], tree.target(path[-1])))
        children = tree.drawn_children(path[-1])
        hits = [child for child in children if tree.token(child) == tokens[-1]]
        if not hits:
            return path, tokens
        path.append(hits[0])


@pytest.mark.parametrize(
    ("rule", "draw", "expected"),
    [
        pytest.param(walk_picks, draw_iid, (0.4715, 0.59625), id="naive"),
        pytest.param(walk_picks, draw_best, (0.65, 0.70), id="best children"),
        pytest.param(multi_step, draw_iid, (0.83, 0.847), id="multi-step"),
        pytest.param(
            recursive_rejection,
            draw_without_replacement,
            (0.840179, 0.878155),
            id="recursive",
        ),
        # On one level, traversal is recursive rejection.
        pytest.param(
            traversal, draw_without_replacement, (0.840179, 0.878155), id="traversal"
        ),
    ],
)
def test_some_child_is_accepted_as_often_as_worked_out(
    rule: Rule, draw: Draw, expected: tuple[float, float]
):
    for num_children, rate in zip((2, 3), expected, strict=True):
        result, num_accepted = emitted(
            rule, flat(num_children), lambda _: P, lambda _: Q, draw, len(P), 1
        )
        assert num_accepted == pytest.approx(rate, abs=1e-6)
        assert total_variation(result, P) < 1e-12


def test_multi_step_is_biased_for_children_that_were_not_drawn():
    arguments = (flat(2), lambda _: P, lambda _: Q, draw_best, len(P), 1)
    result, _ = emitted(multi_step, *arguments)
    assert total_variation(result, P) > 0.05


def random_model(gen: np.random.Generator, vocab_size: int) -> Model:
    """A fresh distribution behind every context, often with impossible tokens."""
    known: dict[tuple[int, ...], Probabilities] = {}

    def model(context: tuple[int, ...]) -> Probabilities:
        if context not in known:
            weights = gen.dirichlet(np.full(vocab_size, 0.7))
            weights[gen.random(vocab_size) < 0.2] = 0
            weights[gen.integers(vocab_size)] += 0.01
            known[context] = weights / weights.sum()
        return known[context]

    return model


def random_shape(
    gen: np.random.Generator, max_num_nodes: int, drawn_share: float
) -> Shape:
    """Up to three levels below the root, wide, deep or lopsided."""
    parents, depths = [-1], [0]
    while len(parents) < max_num_nodes:
        parent = int(gen.integers(len(parents)))
        if depths[parent] < NUM_TOKENS:
            parents.append(parent)
            depths.append(depths[parent] + 1)
    drawn = gen.random(len(parents)) < drawn_share
    drawn[0] = False
    return Shape(tuple(parents), tuple(drawn.tolist()))


def cases(num_cases: int, drawn_share: float) -> Iterator[tuple]:
    gen = np.random.default_rng(0)
    for _ in range(num_cases):
        vocab_size = int(gen.integers(2, 7))
        # As many courses for any vocabulary, about.
        shape = random_shape(gen, int(gen.integers(2, 12 - vocab_size)), drawn_share)
        target, draft = random_model(gen, vocab_size), random_model(gen, vocab_size)
        yield shape, target, draft, vocab_size


@pytest.mark.parametrize("drawn_share", [1.0, 0.7, 0.3])
@pytest.mark.parametrize(("rule", "draw"), RULES)
def test_emits_exactly_the_targets_distribution(
    rule: Rule, draw: Draw, drawn_share: float
):
    for shape, target, draft, vocab_size in cases(80, drawn_share):
        arguments = (shape, target, draft, draw, vocab_size, NUM_TOKENS)
        result, _ = emitted(rule, *arguments)
        expected = joint(target, vocab_size, NUM_TOKENS)
        assert total_variation(result, expected) < 1e-9, shape


@pytest.mark.parametrize("rule", [recursive_rejection, traversal])
def test_siblings_that_repeat_a_token_are_passed_over(rule: Rule):
    """So independent draws are fine too: a repetition tells nothing new."""
    for shape, target, draft, vocab_size in cases(40, 0.8):
        arguments = (shape, target, draft, draw_iid, vocab_size, NUM_TOKENS)
        result, _ = emitted(rule, *arguments)
        expected = joint(target, vocab_size, NUM_TOKENS)
        assert total_variation(result, expected) < 1e-9, shape


@pytest.mark.parametrize(
    ("rule", "draw"),
    [
        pytest.param(multi_step, draw_without_replacement, id="multi-step"),
        pytest.param(multi_step, draw_best, id="multi-step, best children"),
        pytest.param(recursive_rejection, draw_best, id="recursive, best children"),
        pytest.param(traversal, draw_best, id="traversal, best children"),
    ],
)
def test_the_wrong_kind_of_children_is_noticed(rule: Rule, draw: Draw):
    distances = []
    for shape, target, draft, vocab_size in cases(20, 1.0):
        arguments = (shape, target, draft, draw, vocab_size, NUM_TOKENS)
        result, _ = emitted(rule, *arguments)
        expected = joint(target, vocab_size, NUM_TOKENS)
        distances.append(total_variation(result, expected))
    assert max(distances) > 0.05


def test_every_course_counts_once():
    probabilities = [
        probability
        for probability, _, _ in courses(
            recursive_rejection,
            Shape((-1, 0, 0, 1), (False, True, True, True)),
            lambda _: P,
            lambda _: Q,
            draw_without_replacement,
        )
    ]
    assert sum(probabilities) == pytest.approx(1, abs=1e-12)


def test_a_better_rule_accepts_more():
    """On average; a rule can lose to another on some tree."""
    total = dict.fromkeys(["picks", "multi-step", "recursive", "traversal"], 0.0)
    for shape, target, draft, vocab_size in cases(50, 1.0):
        for name, rule, draw in (
            ("picks", walk_picks, draw_iid),
            ("multi-step", multi_step, draw_iid),
            ("recursive", recursive_rejection, draw_without_replacement),
            ("traversal", traversal, draw_without_replacement),
        ):
            arguments = (shape, target, draft, draw, vocab_size, NUM_TOKENS)
            total[name] += emitted(rule, *arguments)[1]
    means = list(total.values())
    assert all(less < more for less, more in pairwise(means)), total
