import random
from collections import Counter
from itertools import accumulate, dropwhile

import pytest
import torch

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.observe import (
    MAX_RANK,
    StepCounts,
    count_step,
    draw_tree,
    walk,
)
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths

KERNELS = choose_kernels(TreeSpecConfig(kernels="torch"), torch.device("cpu"))

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


def exclusive(proposers, path, *, length, num_proposers):
    """Of a tree whose nodes are the root's children, which does not matter here."""
    size = len(proposers)
    trees = TreeBuffers.allocate(1, size, torch.device("cpu"))
    paths = AcceptedPaths.allocate(1, size, torch.device("cpu"))
    trees.num_nodes[0], trees.parents[0, 1:] = size, 0
    trees.proposers[0] = torch.tensor(proposers)
    paths.nodes[0], paths.lengths[0] = torch.tensor(path), length
    cu_num_logits = torch.tensor([0, size]).int()
    slots = torch.tensor([0])
    counts = StepCounts.allocate(1, num_proposers, torch.device("cpu"))
    count_step(KERNELS, trees, paths, slots, cu_num_logits, counts)
    return counts.exclusive.tolist()


def test_a_proposer_is_worth_what_would_be_lost_without_it():
    path = [0, 2, 3, 5, 6, 6, 4]  # stale behind its length
    # Bit 0 and bit 1 per node: node 2 by both, 3 by the second alone, 5 by both.
    bits = [0, 1, 3, 2, 1, 3, 2]
    assert exclusive(bits, path, length=3, num_proposers=2) == [0, 2]
    assert exclusive(bits, path, length=1, num_proposers=2) == [0, 0]


def test_a_single_proposer_is_worth_all_that_was_accepted():
    assert exclusive([0, 1, 1], [0, 1, 2], length=2, num_proposers=1) == [2]
    assert exclusive([0, 1, 1], [0, 0, 0], length=0, num_proposers=1) == [0]


@pytest.mark.parametrize("seed", range(20))
def test_a_step_is_counted_like_a_patient_reader_would(seed):
    """Against lists: any tree, cut to what was scheduled, stale past its end."""
    rng = random.Random(seed)
    num_slots, width, num_proposers = 9, 14, 3
    trees = TreeBuffers.allocate(num_slots, width, torch.device("cpu"))
    paths = AcceptedPaths.allocate(num_slots, width, torch.device("cpu"))
    slots = rng.sample(range(num_slots), 6)
    scheduled = [5, 0, 13, 13, 1, 8]
    expected = Counter()
    verified, lengths = [], []
    for row, slot in enumerate(slots):
        num_nodes = rng.choice([1, 4, 14]) if row else 10
        parents = [-1] + [rng.randrange(node // 2 + 1) for node in range(num_nodes - 1)]
        bits = [0] + [rng.randrange(1, 1 << num_proposers) for _ in parents[1:]]
        size = min(num_nodes - 1, scheduled[row])
        path = [0]
        while children := [
            node for node in range(1, size + 1) if parents[node] == path[-1]
        ]:
            path.append(rng.choice(children))
            expected[f"rank {min(children.index(path[-1]), MAX_RANK)}"] += 1
        for proposer in range(num_proposers):
            own = 1 << proposer
            nodes = range(1, size + 1)
            expected[f"drafted {proposer}"] += sum(bits[n] & own > 0 for n in nodes)
            expected[f"accepted {proposer}"] += sum(bits[n] & own > 0 for n in path)
            others = [bits[node] & ~own > 0 for node in path[1:]]
            expected[f"exclusive {proposer}"] += len([*dropwhile(bool, others)])
        stale = [rng.randrange(width) for _ in range(width)]
        trees.num_nodes[slot] = num_nodes
        trees.parents[slot] = torch.tensor(parents + stale[num_nodes:])
        trees.proposers[slot] = torch.tensor(bits + stale[num_nodes:])
        paths.nodes[row] = torch.tensor(path + stale[len(path) :])
        paths.lengths[row] = len(path) - 1
        verified.append(size)
        lengths.append(len(path) - 1)
    cu_num_logits = torch.tensor([0, *accumulate(each + 1 for each in scheduled)]).int()
    counts = StepCounts.allocate(len(slots), num_proposers, torch.device("cpu"))
    count_step(KERNELS, trees, paths, torch.tensor(slots), cu_num_logits, counts)
    counts = counts.to_host()
    assert counts.verified.tolist() == verified
    assert counts.lengths.tolist() == lengths
    found = Counter()
    for name, values in (
        ("rank", counts.by_rank),
        ("drafted", counts.drafted),
        ("accepted", counts.accepted),
        ("exclusive", counts.exclusive),
    ):
        found.update({f"{name} {place}": n for place, n in enumerate(values.tolist())})
    assert found - expected == expected - found == Counter()


def test_ranks_past_the_last_are_counted_together():
    trees = TreeBuffers.allocate(1, 13, torch.device("cpu"))
    paths = AcceptedPaths.allocate(1, 13, torch.device("cpu"))
    trees.num_nodes[0], trees.parents[0, 1:] = 13, 0  # twelve children of the root
    slots = torch.tensor([0])
    for node, rank in ((1, 0), (8, 7), (9, 8), (12, 8)):
        paths.nodes[0, 1], paths.lengths[0] = node, 1
        counts = StepCounts.allocate(1, 1, torch.device("cpu"))
        count_step(KERNELS, trees, paths, slots, torch.tensor([0, 13]), counts)
        assert counts.by_rank.tolist() == [int(each == rank) for each in range(9)]
