from vllm_treespec.core.observe import draw_tree, walk

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
