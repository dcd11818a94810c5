"""A template is a tree, breadth first, with no gaps in its ranks."""

import pytest

from vllm_treespec.core.propose.template import TreeTemplate


def test_branching_gives_every_node_of_a_level_as_many_children():
    template = TreeTemplate.from_branching((2, 3, 1))
    assert template.parents == (-1, -1, 0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7)
    assert template.ranks == (0, 1, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0)
    assert template.depths == (1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3)
    assert (template.num_nodes, template.depth) == (14, 3)


def test_ones_are_a_chain():
    template = TreeTemplate.from_branching((1, 1, 1, 1))
    assert template == TreeTemplate((-1, 0, 1, 2), (0, 0, 0, 0))
    assert template.depth == 4


def test_a_level_may_be_ragged():
    template = TreeTemplate((-1, -1, -1, 0, 0, 2), (0, 1, 2, 0, 1, 0))
    assert template.depths == (1, 1, 1, 2, 2, 2)


@pytest.mark.parametrize(
    ("parents", "ranks", "problem"),
    [
        ((), (), r"parents=\(\)"),
        ((-1, 0), (0,), "1 ranks for 2 parents"),
        ((-1, 1), (0, 0), r"parents\[1\]=1: must be in \[-1, 0\]"),
        ((-2,), (0,), r"parents\[0\]=-2: must be in \[-1, -1\]"),
        # Depth first: the second child of the root comes after a grandchild.
        ((-1, 0, -1), (0, 0, 1), r"parents\[2\]=-1: must be >= 0"),
        # Level by level, but a level's parents are not in order.
        ((-1, -1, 1, 0), (0, 1, 0, 0), r"parents\[3\]=0: must be >= 1"),
        ((-1, -1), (0, 2), r"ranks\[1\]=2: must be 1"),
        ((-1, -1), (1, 0), r"ranks\[0\]=1: must be 0"),
        ((-1, -1, 0, 1), (0, 1, 0, 1), r"ranks\[3\]=1: must be 0"),
    ],
)
def test_what_is_no_template_is_refused_by_value(parents, ranks, problem):
    with pytest.raises(ValueError, match=problem):
        TreeTemplate(parents, ranks)


def test_a_level_without_children_is_refused_by_value():
    with pytest.raises(ValueError, match=r"branching\[1\]=0: must be >= 1"):
        TreeTemplate.from_branching((2, 0))
    with pytest.raises(ValueError, match=r"parents=\(\)"):
        TreeTemplate.from_branching(())
