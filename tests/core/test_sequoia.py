"""The solver finds the best tree; brute force and Sequoia's own numbers agree."""

import time
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from vllm_treespec.core.propose.sequoia import (
    expected_tokens,
    optimal_template,
)
from vllm_treespec.core.propose.template import TreeTemplate

# A pair measured by Sequoia's authors, 32 ranks.
PUBLISHED = (
    *(0.6206, 0.0993, 0.0447, 0.0277, 0.0192, 0.0142, 0.0104, 0.0083),
    *(0.0068, 0.0061, 0.0051, 0.0055, 0.0036, 0.0030, 0.0031, 0.0028),
    *(0.0028, 0.0026, 0.0025, 0.0021, 0.0025, 0.0014, 0.0016, 0.0022),
    *(0.0011, 0.0015, 0.0012, 0.0015, 0.0017, 0.0013, 0.0014, 0.0014),
)


@cache
def trees(num_nodes: int, max_depth: int) -> tuple[tuple, ...]:
    """All ordered forests of that many nodes; a tree is the tuple of its children."""
    if num_nodes == 0:
        return ((),)
    return tuple(
        (first, *others)
        for below in range(num_nodes if max_depth else 0)
        for first in trees(below, max_depth - 1)
        for others in trees(num_nodes - 1 - below, max_depth)
    )


def value(forest: tuple, acceptance) -> float:
    """Sum of the probabilities of a forest's nodes."""
    pairs = zip(forest, acceptance, strict=False)
    return sum(rate * (1.0 + value(child, acceptance)) for child, rate in pairs)


def widest(forest: tuple) -> int:
    return max([len(forest), *map(widest, forest)])


def best_by_brute_force(acceptance, num_nodes: int, max_depth: int) -> float:
    return 1.0 + max(
        value(forest, acceptance)
        for count in range(1, num_nodes + 1)
        for forest in trees(count, max_depth)
        if widest(forest) <= len(acceptance)
    )


def random_acceptances(num_vectors: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for number in range(num_vectors):
        rates = rng.dirichlet(np.full(2 + number % 5, 0.7))[:-1] * rng.uniform(0.5, 1)
        yield rates if number % 2 else -np.sort(-rates)


def test_catalan_many_trees_are_tried():
    assert [len(trees(count, count)) for count in range(8)] == [
        *(1, 1, 2, 5, 14, 42, 132, 429)
    ]


@pytest.mark.parametrize("max_depth", [1, 2, 3, 7])
def test_no_small_tree_is_better(max_depth):
    for number, rates in enumerate(random_acceptances(24)):
        acceptance = rates.tolist()
        num_nodes = 1 + number % 7
        template = optimal_template(acceptance, num_nodes, max_depth)
        assert template.num_nodes <= num_nodes
        assert template.depth <= max_depth
        assert expected_tokens(template, acceptance) == pytest.approx(
            best_by_brute_force(acceptance, num_nodes, max_depth), abs=1e-12
        ), (acceptance, num_nodes)


def test_a_worthless_choice_is_a_step_to_a_better_one():
    """Children are a prefix of the ranks, so rank 1 is there for rank 2's sake."""
    template = optimal_template((0.2, 0.0, 0.7), 4, 2)
    assert template == TreeTemplate((-1, -1, -1, 2), (0, 1, 2, 0))


def test_nodes_that_add_nothing_are_left_out():
    assert optimal_template((0.9, 0.0), 50, 3) == TreeTemplate.from_branching((1, 1, 1))
    assert optimal_template((0.0, 0.0), 50, 3) == TreeTemplate((-1,), (0,))
    assert optimal_template((0.0, 0.9), 1, 3) == TreeTemplate((-1,), (0,))


# Sequoia counts the root as a node and as a level.
@pytest.mark.parametrize(
    ("num_levels", "expected"),
    [
        (11, (2.245, 2.646, 2.987, 3.309, 3.624, 3.929)),
        (10, (2.245, 2.646, 2.987, 3.309, 3.622, 3.924)),
    ],
)
def test_sequoias_own_search_finds_as_many_tokens(num_levels, expected):
    found = [
        expected_tokens(
            optimal_template(PUBLISHED, size - 1, num_levels - 1), PUBLISHED
        )
        for size in (4, 8, 16, 32, 64, 128)
    ]
    assert found == pytest.approx(expected, abs=6e-4)


def test_more_room_never_hurts():
    by_nodes = [
        expected_tokens(optimal_template(PUBLISHED, count, 5), PUBLISHED)
        for count in range(1, 41)
    ]
    assert by_nodes == sorted(by_nodes)
    assert by_nodes[-1] > by_nodes[0] + 1
    by_depth = [
        expected_tokens(optimal_template(PUBLISHED, 60, depth), PUBLISHED)
        for depth in range(1, 13)
    ]
    assert by_depth == sorted(by_depth)
    assert by_depth[-1] > by_depth[0] + 1


@pytest.mark.parametrize("max_depth", [1, 4, 9])
def test_both_bounds_are_kept_and_the_budget_is_used(max_depth):
    template = optimal_template(PUBLISHED, 200, max_depth)
    assert template.depth == max_depth
    # One level has no more nodes than ranks.
    assert template.num_nodes == (32 if max_depth == 1 else 200)


def test_the_largest_tree_is_found_in_seconds():
    start = time.perf_counter()
    template = optimal_template(PUBLISHED, 1024, 16)
    assert time.perf_counter() - start < 30
    assert (template.num_nodes, template.depth) == (1024, 16)


def test_expected_tokens_are_the_bonus_and_every_nodes_probability():
    template = TreeTemplate((-1, -1, 0, 1, 1), (0, 1, 0, 0, 1))
    assert expected_tokens(template, (0.5, 0.25)) == pytest.approx(
        1 + 0.5 + 0.25 + 0.5 * 0.5 + 0.25 * 0.5 + 0.25 * 0.25
    )
    with pytest.raises(ValueError, match="uses rank 1, acceptance has 1 ranks"):
        expected_tokens(template, (0.5,))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (((), 4, 4), r"acceptance=\[\]"),
        (((0.5, 1.5), 4, 4), r"acceptance\[1\]=1.5: must be in \[0, 1\]"),
        (((float("nan"),), 4, 4), r"acceptance\[0\]=nan"),
        (((0.5,), 0, 4), "num_nodes=0: must be >= 1"),
        (((0.5,), 4, 0), "max_depth=0: must be >= 1"),
    ],
)
def test_a_wrong_argument_is_refused_by_value(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        optimal_template(*arguments)
