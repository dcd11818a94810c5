import torch

from vllm_treespec.core.observe import draw_tree, marginal_acceptance, walk

#     root
#    /    \
#   a      b
#  / \     |
# c   d    e
TOKENS = [0, 1, 2, 3, 4, 5]
PARENTS = [-1, 0, 0, 1, 1, 2]


def test_the_walk_follows_emitted_tokens_until_no_child_carries_one():
    assert walk(TOKENS, PARENTS, [1, 4, 9]) == [1, 4]
    assert walk(TOKENS, PARENTS, [2, 5]) == [2, 5]
    assert walk(TOKENS, PARENTS, [5]) == []
    assert walk(TOKENS, PARENTS, []) == []


def test_a_tree_is_drawn_with_its_accepted_path():
    drawing = draw_tree(["(root)", *"abcde"], PARENTS, [2, 5])
    assert drawing.splitlines() == [
        "  (root)",
        "  |- a",
        "  |  |- c",
        "  |  `- d",
        "* `- b",
        "*    `- e",
    ]


def test_a_proposer_is_worth_what_would_be_lost_without_it():
    #        accepted: 0 -> 2 -> 3 -> 5, root first
    nodes = torch.tensor([[0, 2, 3, 5, 6, 6, 4]])  # stale behind the path
    # Bit 0 and bit 1 per node: node 2 by both, 3 by the second alone, 5 by both.
    proposers = torch.tensor([[0, 1, 3, 2, 1, 3, 2]])
    whole = marginal_acceptance(proposers, nodes, torch.tensor([3]), 2)
    assert whole.tolist() == [0, 2]
    cut = marginal_acceptance(proposers, nodes, torch.tensor([1]), 2)
    assert cut.tolist() == [0, 0]


def test_a_single_proposer_is_worth_all_that_was_accepted():
    nodes = torch.tensor([[0, 1, 2], [0, 0, 0], [0, 2, 0]])
    lengths = torch.tensor([2, 0, 1])
    proposers = torch.tensor([[0, 1, 1]] * 3)
    assert marginal_acceptance(proposers, nodes, lengths, 1).tolist() == [3]
