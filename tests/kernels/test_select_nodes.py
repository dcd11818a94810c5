"""kernels/select_nodes.py against its reference and against all subsets."""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from vllm_treespec.kernels.reference.select_nodes import select_nodes as reference
from vllm_treespec.kernels.select_nodes import select_nodes
from vllm_treespec.testing.trees import chain_parents, random_parents

STALE = -7
NAN, INF = float("nan"), float("inf")
MAX_NUM_REQS = 7


class Candidates(NamedTuple):
    token_ids: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor
    proposers: torch.Tensor
    num_candidates: torch.Tensor


class Selected(NamedTuple):
    token_ids: torch.Tensor
    parents: torch.Tensor
    proposers: torch.Tensor
    num_nodes: torch.Tensor
    draft_tokens: torch.Tensor


@dataclass
class Tree:
    """One request's tree as lists, root included."""

    token_ids: list[int]
    parents: list[int]
    proposers: list[int]
    draft_tokens: list[int]


def int32(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def outputs(num_reqs: int, max_num_nodes: int, device: torch.device) -> Selected:
    column = torch.full((MAX_NUM_REQS, max_num_nodes), STALE, device=device).int()
    draft_tokens = torch.full((num_reqs, max_num_nodes - 1), STALE, device=device)
    counts = column[:, 0].clone()
    return Selected(column, column.clone(), column.clone(), counts, draft_tokens)


def random_candidates(num_reqs: int, size: int, device: torch.device) -> Candidates:
    """Tokens and proposers are distinct, so that a node tells where it came from."""
    gen = torch.Generator().manual_seed(size)
    shape = (num_reqs, size)
    token_ids = 1 + torch.randperm(num_reqs * size, generator=gen).view(shape)
    return Candidates(
        token_ids.int().to(device),
        (random_parents(num_reqs, size + 1)[:, 1:] - 1).contiguous().to(device),
        # no path's log-probs: half of the children claim more than their parents
        -torch.rand(shape, generator=gen).to(device),
        (10_000 + token_ids).int().to(device),
        torch.full((num_reqs,), size, dtype=torch.int32, device=device),
    )


def select_one(
    parents: list[int],
    scores: list[float],
    budget: int,
    device: torch.device,
    *,
    chain_only: bool = False,
    max_num_nodes: int = 8,
) -> Tree:
    """Candidate c has token 10 + c and proposers 100 + c; the request has slot 3."""
    size = len(parents)
    selected = outputs(1, max_num_nodes, device)
    select_nodes(
        int32([3], device),
        int32([[10 + candidate for candidate in range(size)]], device),
        int32([parents], device),
        torch.tensor([scores], device=device),
        int32([[100 + candidate for candidate in range(size)]], device),
        int32([size], device),
        int32([budget], device),
        torch.tensor([chain_only], device=device),
        *selected,
    )
    num_nodes = int(selected.num_nodes[3])
    columns = (column[3, :num_nodes].tolist() for column in selected[:3])
    return Tree(*columns, draft_tokens=selected.draft_tokens[0].tolist())


@pytest.mark.parametrize("size", [1, 2, 7, 33, 65, 200])
def test_matches_reference(size: int, device: torch.device):
    candidates = random_candidates(4, size, device)
    candidates.num_candidates[1] = size // 2
    candidates.scores[2, ::5] = -INF
    # more room than candidates, less, and as many
    max_num_nodes = {7: 65, 33: 9}.get(size, size + 1)
    arguments = (
        int32([5, 0, 6, 2], device),
        *candidates,
        int32([size, size, size // 2, size], device),
        torch.tensor([False, False, False, True], device=device),
    )
    selected, expected = (outputs(4, max_num_nodes, device) for _ in range(2))
    select_nodes(*arguments, *selected)
    reference(*arguments, *expected)
    torch.testing.assert_close(tuple(selected), tuple(expected), rtol=0, atol=0)


def test_matches_reference_at_full_size(device: torch.device):
    candidates = random_candidates(1, 512, device)
    # eight levels of score: ties everywhere
    candidates.scores.mul_(8).ceil_().div_(8)
    arguments = (int32([4], device), *candidates, int32([1024], device))
    arguments = (*arguments, int32([0], device))
    selected, expected = outputs(1, 1025, device), outputs(1, 1025, device)
    select_nodes(*arguments, *selected)
    reference(*arguments, *expected)
    torch.testing.assert_close(tuple(selected), tuple(expected), rtol=0, atol=0)


def path_scores(parents: list[int], log_probs: list[float]) -> list[float]:
    """What a proposer hands over, from log-probs given the parent."""
    scores: list[float] = []
    for parent, log_prob in zip(parents, log_probs, strict=True):
        scores.append(log_prob + (scores[parent] if parent >= 0 else 0.0))
    return scores


def best_subset(parents: list[int], scores: list[float], budget: int) -> set[int]:
    """Of all ancestor-closed subsets, the one that expects most accepted tokens."""

    def expected_accepted(nodes: tuple[int, ...]) -> float:
        return sum(math.exp(scores[node]) for node in nodes)

    subsets = itertools.combinations(range(len(parents)), min(budget, len(parents)))
    closed = (
        nodes for nodes in subsets if all(parents[n] in (-1, *nodes) for n in nodes)
    )
    return set(max(closed, key=expected_accepted))


@pytest.mark.parametrize("budget", [1, 3, 5, 9])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_subtree_expects_more_accepted_tokens(
    seed: int, budget: int, device: torch.device
):
    gen = torch.Generator().manual_seed(seed)
    parents = (random_parents(1, 10, seed)[0, 1:] - 1).tolist()
    scores = path_scores(parents, (-2 * torch.rand(9, generator=gen)).tolist())
    tree = select_one(parents, scores, budget, device, max_num_nodes=10)
    kept = {token_id - 10 for token_id in tree.token_ids[1:]}
    assert kept == best_subset(parents, scores, budget)


def test_nodes_are_best_first_and_keep_their_parents(device: torch.device):
    #        root                     root
    #       /    \                   /    \
    #  0: -2.0   1: -0.1    ->   3: 10     1: 11
    #     |      /    \          |         |
    #  2: -2.1  3: -3  4: -1     4: 12     2: 14
    tree = select_one([-1, -1, 0, 1, 1], [-2.0, -0.1, -2.1, -3.0, -1.0], 4, device)
    assert tree.token_ids == [0, 11, 14, 10, 12]
    assert tree.parents == [-1, 0, 1, 0, 3]
    assert tree.proposers == [0, 101, 104, 100, 102]
    assert tree.draft_tokens == [11, 14, 10, 12, 0, 0, 0]


@pytest.mark.parametrize("claim", [-0.1, 0.0, 3.0, INF])
def test_a_node_is_worth_no_more_than_its_worst_ancestor(
    claim: float, device: torch.device
):
    # root -- 0: -5.0 -- 1: -4.9 -- 2: claim, and 3: -5.0, and 4: -1.0
    parents, scores = [-1, 0, 1, -1, -1], [-5.0, -4.9, claim, -5.0, -1.0]
    tree = select_one(parents, scores, 5, device)
    assert tree.token_ids == [0, 14, 10, 11, 12, 13]
    assert tree.parents == [-1, 0, 0, 2, 3, 0]
    assert select_one(parents, scores, 1, device).token_ids == [0, 14]


def test_scores_of_a_path_are_not_added_up(device: torch.device):
    # root -- 0: -1.0 -- 1: -1.5, and 2: -2.0
    tree = select_one([-1, 0, -1], [-1.0, -1.5, -2.0], 2, device)
    assert tree.token_ids == [0, 10, 11]


def test_every_prefix_is_a_tree(device: torch.device):
    candidates = random_candidates(1, 60, device)
    selected = outputs(1, 61, device)
    arguments = (*candidates, int32([60], device), int32([0], device))
    select_nodes(int32([0], device), *arguments, *selected)
    parents = selected.parents[0].tolist()
    assert parents[0] == -1
    assert all(0 <= parent < node for node, parent in enumerate(parents) if node)


def test_ties_go_to_the_lower_index(device: torch.device):
    tree = select_one([-1, -1, -1, -1], [-1.0, -0.5, -1.0, -0.5], 3, device)
    assert tree.token_ids == [0, 11, 13, 10]


def test_a_certain_child_follows_its_parent(device: torch.device):
    # as likely as the parent, or so nearly that float32 cannot tell, or badly wrong
    scores = [-10.0, -10.0 - 1e-9, -0.0, 0.0, -10.0]
    tree = select_one([-1, 0, 1, 2, -1], scores, 5, device)
    assert tree.token_ids == [0, 10, 11, 12, 13, 14]
    assert tree.parents == [-1, 0, 1, 2, 3, 0]


def test_rounding_never_lifts_a_child_over_its_parent(device: torch.device):
    # a path's log-probs, each off by an error of its own
    size = 60
    gen = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(size, generator=gen) * 10.0 ** -torch.arange(size).fmod(9)
    scores = log_probs.cumsum(0) * (1 + 1e-6 * torch.randn(size, generator=gen))
    assert (scores.diff() > 0).any(), "a child lies above its parent, or this is idle"
    parents = chain_parents(1, size)[0].tolist()
    tree = select_one(parents, scores.tolist(), size, device, max_num_nodes=size + 1)
    assert tree.parents == list(range(-1, size))


def test_positive_scores_count_as_certain(device: torch.device):
    # and no more than that: they tie
    tree = select_one([-1, -1, -1, -1], [0.0, 5.0, -1.0, INF], 4, device)
    assert tree.token_ids == [0, 10, 11, 13, 12]


@pytest.mark.parametrize("bad", [NAN, -INF])
@pytest.mark.parametrize("chain_only", [False, True])
def test_impossible_nodes_go_with_their_descendants(
    chain_only: bool, bad: float, device: torch.device
):
    # root -- 0: bad -- 1 -- 2, and 3 -- 4: bad
    scores = [bad, -0.1, 0.0, -3.0, bad]
    tree = select_one([-1, 0, 1, -1, 3], scores, 5, device, chain_only=chain_only)
    assert tree.token_ids == [0, 13]
    assert tree.draft_tokens == [13, 0, 0, 0, 0, 0, 0]


def test_a_chain_takes_the_best_child_from_the_root_on(device: torch.device):
    #            root
    #           /    \
    #     0: -1.0    1: -0.5
    #     |          /     \
    #  2: -1.1   3: -2.5   4: -2.0
    #                        |
    #                      5: -9.0
    parents, scores = [-1, -1, 0, 1, 1, 4], [-1.0, -0.5, -1.1, -2.5, -2.0, -9.0]
    tree = select_one(parents, scores, 7, device, chain_only=True)
    assert tree.token_ids == [0, 11, 14, 15]
    assert tree.parents == [-1, 0, 1, 2]
    cut = select_one(parents, scores, 2, device, chain_only=True)
    assert cut.token_ids == [0, 11, 14]


def test_a_chain_breaks_ties_as_a_tree_does(device: torch.device):
    tree = select_one(
        [-1, -1, 1, 0], [-1.0, -1.0, -1.1, -5.0], 7, device, chain_only=True
    )
    assert tree.token_ids == [0, 10, 13]
    # neither child is worth more than its parent
    tree = select_one([-1, 0, 0], [-2.0, -1.0, -0.5], 7, device, chain_only=True)
    assert tree.token_ids == [0, 10, 11]


@pytest.mark.parametrize(("budget", "num_drafts"), [(-1, 0), (0, 0), (2, 2), (99, 3)])
def test_the_budget_leaves_the_root_out(
    budget: int, num_drafts: int, device: torch.device
):
    tree = select_one([-1] * 5, [-1.0] * 5, budget, device, max_num_nodes=4)
    assert len(tree.token_ids) == num_drafts + 1
    assert (tree.token_ids[0], tree.parents[0], tree.proposers[0]) == (0, -1, 0)


def test_unused_draft_tokens_are_valid_ids(device: torch.device):
    # many more columns than candidates
    tree = select_one([-1, 0], [-1.0, -1.0], 99, device, max_num_nodes=100)
    assert tree.draft_tokens == [10, 11] + [0] * 97


def test_a_tree_of_the_root_alone_has_no_drafts(device: torch.device):
    tree = select_one([-1, 0], [-1.0, -1.0], 9, device, max_num_nodes=1)
    assert tree == Tree([0], [-1], [0], [])


def test_candidates_past_the_count_are_ignored(device: torch.device):
    candidates = random_candidates(1, 6, device)
    candidates.scores[0, 3:] = 0.0
    candidates.parents[0, 3:] = -1
    candidates.num_candidates[0] = 3
    for chain_only in (0, 1):
        selected = outputs(1, 7, device)
        arguments = (*candidates, int32([6], device), int32([chain_only], device))
        select_nodes(int32([1], device), *arguments, *selected)
        stale_tokens = set(candidates.token_ids[0, 3:].tolist())
        assert not stale_tokens & set(selected.draft_tokens[0].tolist())
        assert 2 <= selected.num_nodes[1] <= 4


def test_other_slots_and_columns_past_the_tree_are_left_alone(device: torch.device):
    candidates = random_candidates(1, 5, device)
    selected = outputs(1, 6, device)
    arguments = (*candidates, int32([2], device), int32([0], device))
    select_nodes(int32([4], device), *arguments, *selected)
    others = [slot for slot in range(MAX_NUM_REQS) if slot != 4]
    for out in selected[:4]:
        assert (out[others] == STALE).all()
    for out in selected[:3]:
        assert (out[4, 3:] == STALE).all()


def test_reads_and_writes_views_of_wider_buffers(device: torch.device):
    narrow = random_candidates(3, 7, device)
    # -1 beyond the view: a wrong stride reads a tree, not a cycle
    views = [torch.full((6, 12), -1, dtype=t.dtype, device=device) for t in narrow[:4]]
    candidates = Candidates(*(view[::2, 3:10] for view in views), narrow[4])
    for view, tensor in zip(candidates, narrow, strict=True):
        view.copy_(tensor)
    arguments = (
        int32([6, 1, 3], device),
        *candidates,
        int32([5, 7, 3], device),
        torch.tensor([False, True, False], device=device),
    )
    buffers, expected = outputs(3, 20, device), outputs(3, 20, device)
    for fn, out in ((select_nodes, buffers), (reference, expected)):
        trees = (column[:, :9] for column in out[:3])
        fn(*arguments, *trees, out.num_nodes, out.draft_tokens[:, :8])
    torch.testing.assert_close(tuple(buffers), tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parents", "token_ids, parents, scores and proposers must have one shape"),
        ("num_candidates", "every per-request tensor must have 2 rows"),
    ],
)
def test_rejects_impossible_candidates(name: str, message: str, device: torch.device):
    candidates = random_candidates(2, 4, device)
    shorter = candidates._replace(**{name: getattr(candidates, name)[:1]})
    arguments = (*shorter, int32([4, 4], device), int32([0, 0], device))
    with pytest.raises(ValueError, match=message):
        select_nodes(int32([0, 1], device), *arguments, *outputs(2, 5, device))


def test_rejects_draft_tokens_of_another_width(device: torch.device):
    candidates = random_candidates(1, 4, device)
    arguments = (*candidates, int32([4], device), int32([0], device))
    selected = outputs(1, 5, device)._replace(
        draft_tokens=outputs(1, 5, device)[4][:, :3]
    )
    with pytest.raises(
        ValueError, match="draft_tokens has 3 columns, expected one less"
    ):
        select_nodes(int32([0], device), *arguments, *selected)
