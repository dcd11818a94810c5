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


def random_candidates(size: int, device: torch.device) -> Candidates:
    """Tokens and proposers are distinct, so that a node tells where it came from."""
    gen = torch.Generator().manual_seed(size)
    shape = (MAX_NUM_REQS, size)
    token_ids = 1 + torch.randperm(MAX_NUM_REQS * size, generator=gen).view(shape)
    return Candidates(
        token_ids.int().to(device),
        (random_parents(MAX_NUM_REQS, size + 1)[:, 1:] - 1).contiguous().to(device),
        # no path's log-probs: half of the children claim more than their parents
        -torch.rand(shape, generator=gen).to(device),
        (10_000 + token_ids).int().to(device),
        torch.full((MAX_NUM_REQS,), size, dtype=torch.int32, device=device),
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
    rows = torch.zeros(4, 1, device=device).int()
    selected = outputs(1, max_num_nodes, device)
    select_nodes(
        int32([3], device),
        rows + torch.arange(10, 10 + size, device=device).int(),
        rows + int32([parents], device),
        rows + torch.tensor([scores], device=device),
        rows + torch.arange(100, 100 + size, device=device).int(),
        rows[:, 0] + size,
        *limits(4, device, budget=budget, chain_only=chain_only),
        *(int32([1], device), 999),
        *selected,
    )
    num_nodes = int(selected.num_nodes[3])
    columns = (column[3, :num_nodes].tolist() for column in selected[:3])
    return Tree(*columns, draft_tokens=selected.draft_tokens[0].tolist())


def limits(
    num_slots: int, device: torch.device, *, budget: int, chain_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every slot's."""
    return (
        torch.full((num_slots,), budget, dtype=torch.int32, device=device),
        torch.full((num_slots,), chain_only, dtype=torch.bool, device=device),
    )


@pytest.mark.parametrize("num_nodes", [5, 999])
@pytest.mark.parametrize("size", [1, 2, 7, 33, 65, 200])
def test_matches_reference(size: int, num_nodes: int, device: torch.device):
    candidates = random_candidates(size, device)
    candidates.num_candidates[0] = size // 2
    candidates.scores[6, ::5] = -INF
    # more room than candidates, less, and as many
    max_num_nodes = {7: 65, 33: 9}.get(size, size + 1)
    arguments = (
        int32([5, 0, 6, 2, 1], device),
        *candidates,
        int32([size, size, size, 1, 1, size, size // 2], device),
        torch.tensor([slot == 2 for slot in range(MAX_NUM_REQS)], device=device),
        int32([1, 3, 2, 1, 0], device),
        num_nodes,
    )
    selected, expected = (outputs(5, max_num_nodes, device) for _ in range(2))
    select_nodes(*arguments, *selected)
    reference(*arguments, *expected)
    torch.testing.assert_close(tuple(selected), tuple(expected), rtol=0, atol=0)


def test_matches_reference_at_full_size(device: torch.device):
    candidates = random_candidates(512, device)
    # eight levels of score: ties everywhere
    candidates.scores.mul_(8).ceil_().div_(8)
    arguments = (
        int32([4], device),
        *candidates,
        *limits(MAX_NUM_REQS, device, budget=1024),
        *(int32([1], device), 1024),
    )
    selected, expected = outputs(1, 1025, device), outputs(1, 1025, device)
    select_nodes(*arguments, *selected)
    reference(*arguments, *expected)
    torch.testing.assert_close(tuple(selected), tuple(expected), rtol=0, atol=0)


def test_a_request_without_a_newest_token_gets_no_nodes(device: torch.device):
    candidates = random_candidates(5, device)
    selected = outputs(3, 6, device)
    select_nodes(
        int32([4, 0, 5], device),
        *candidates,
        *limits(MAX_NUM_REQS, device, budget=4),
        *(int32([2, 0, 1], device), 3),
        *selected,
    )
    assert selected.num_nodes[[4, 0, 5]].tolist() == [4, 1, 4]
    assert selected.draft_tokens[1].tolist() == [0] * 5


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
    candidates = random_candidates(60, device)
    selected = outputs(1, 61, device)
    arguments = (*limits(MAX_NUM_REQS, device, budget=60), int32([1], device), 60)
    select_nodes(int32([0], device), *candidates, *arguments, *selected)
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
    candidates = random_candidates(6, device)
    candidates.scores[1, 3:] = 0.0
    candidates.parents[1, 3:] = -1
    candidates.num_candidates[1] = 3
    for chain_only in (False, True):
        selected = outputs(1, 7, device)
        limited = limits(MAX_NUM_REQS, device, budget=6, chain_only=chain_only)
        arguments = (*candidates, *limited, int32([1], device), 6)
        select_nodes(int32([1], device), *arguments, *selected)
        stale_tokens = set(candidates.token_ids[1, 3:].tolist())
        assert not stale_tokens & set(selected.draft_tokens[0].tolist())
        assert 2 <= selected.num_nodes[1] <= 4


def test_other_slots_and_columns_past_the_tree_are_left_alone(device: torch.device):
    candidates = random_candidates(5, device)
    selected = outputs(1, 6, device)
    arguments = (*limits(MAX_NUM_REQS, device, budget=2), int32([1], device), 9)
    select_nodes(int32([4], device), *candidates, *arguments, *selected)
    others = [slot for slot in range(MAX_NUM_REQS) if slot != 4]
    for out in selected[:4]:
        assert (out[others] == STALE).all()
    for out in selected[:3]:
        assert (out[4, 3:] == STALE).all()


def test_reads_and_writes_views_of_wider_buffers(device: torch.device):
    narrow = random_candidates(7, device)
    # -1 beyond the view: a wrong stride reads a tree, not a cycle
    shape = (2 * MAX_NUM_REQS, 12)
    views = [torch.full(shape, -1, dtype=t.dtype, device=device) for t in narrow[:4]]
    candidates = Candidates(*(view[::2, 3:10] for view in views), narrow[4])
    for view, tensor in zip(candidates, narrow, strict=True):
        view.copy_(tensor.clone())
    arguments = (
        int32([6, 1, 3], device),
        *candidates,
        int32([0, 7, 0, 3, 0, 0, 5], device),
        torch.tensor([slot == 1 for slot in range(MAX_NUM_REQS)], device=device),
        *(int32([1, 1, 1], device), 6),
    )
    buffers, expected = outputs(3, 20, device), outputs(3, 20, device)
    drafts = []
    for fn, out in ((select_nodes, buffers), (reference, expected)):
        trees = (column[:, :9] for column in out[:3])
        drafts.append(out.draft_tokens[:, :8].contiguous())
        fn(*arguments, *trees, out.num_nodes, drafts[-1])
    assert torch.equal(*drafts)
    torch.testing.assert_close(tuple(buffers), tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parents", "token_ids, parents, scores and proposers must have one shape"),
        ("num_candidates", "every per-slot tensor must have 7 slots"),
    ],
)
def test_rejects_impossible_candidates(name: str, message: str, device: torch.device):
    candidates = random_candidates(4, device)
    shorter = candidates._replace(**{name: getattr(candidates, name)[:1]})
    arguments = (*limits(MAX_NUM_REQS, device, budget=4), int32([1, 1], device), 4)
    with pytest.raises(ValueError, match=message):
        select_nodes(
            int32([0, 1], device), *shorter, *arguments, *outputs(2, 5, device)
        )


@pytest.mark.parametrize(
    ("num_rows", "width", "message"),
    [
        (1, 3, "draft_tokens has 3 columns, expected one less"),
        (0, 4, "num_sampled and draft_tokens must have 1 rows"),
    ],
)
def test_rejects_draft_tokens_of_another_shape(
    num_rows: int, width: int, message: str, device: torch.device
):
    candidates = random_candidates(4, device)
    arguments = (*limits(MAX_NUM_REQS, device, budget=4), int32([1], device), 4)
    draft_tokens = torch.zeros(num_rows, width, dtype=torch.int64, device=device)
    selected = outputs(1, 5, device)._replace(draft_tokens=draft_tokens)
    with pytest.raises(ValueError, match=message):
        select_nodes(int32([0], device), *candidates, *arguments, *selected)
