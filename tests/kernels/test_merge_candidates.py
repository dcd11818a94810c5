"""kernels/merge_candidates.py against its reference and against sets of paths."""

from typing import NamedTuple

import pytest
import torch

from vllm_treespec.kernels.merge_candidates import merge_candidates
from vllm_treespec.kernels.reference.merge_candidates import (
    merge_candidates as reference,
)
from vllm_treespec.testing.trees import chain_parents, random_parents

STALE = -7
MAX_NUM_REQS = 5
NAN, INF = float("nan"), float("inf")

Path = tuple[int, ...]
# (token id, parent, score) per candidate
Tree = list[tuple[int, int, float]]


class Candidates(NamedTuple):
    slots: torch.Tensor
    token_ids: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor
    num_candidates: torch.Tensor


class Merged(NamedTuple):
    token_ids: torch.Tensor
    parents: torch.Tensor
    proposers: torch.Tensor
    own_scores: torch.Tensor
    num_merged: torch.Tensor
    sibling_bits: torch.Tensor


def outputs(num_proposers: int, max_num_merged: int, device: torch.device) -> Merged:
    column = torch.full((MAX_NUM_REQS, max_num_merged), STALE, device=device).int()
    return Merged(
        column,
        column.clone(),
        column.clone(),
        column.float().repeat(num_proposers, 1, 1),
        column[:, 0].clone(),
        column.clone(),
    )


def random_candidates(
    num_proposers: int, num_reqs: int, size: int, vocab_size: int, device: torch.device
) -> Candidates:
    gen = torch.Generator().manual_seed(size)
    shape = (num_proposers, num_reqs, size)
    trees = [random_parents(num_reqs, size + 1, seed) for seed in range(num_proposers)]
    return Candidates(
        torch.tensor([4, 0, 2][:num_reqs], device=device),
        torch.randint(vocab_size, shape, generator=gen).int().to(device),
        (torch.stack(trees)[:, :, 1:] - 1).contiguous().to(device),
        -torch.rand(shape, generator=gen).to(device),
        torch.randint(size + 1, shape[:2], generator=gen).int().to(device),
    )


def merge_trees(trees: list[Tree], device: torch.device) -> list[tuple[int, ...]]:
    """One request's (token id, parent, best score, proposers) nodes, in sorted order."""
    size = max(len(tree) for tree in trees)
    padded = [tree + [(STALE, STALE, NAN)] * (size - len(tree)) for tree in trees]
    token_ids, parents, scores = torch.tensor(padded).permute(2, 0, 1).contiguous()
    merged = outputs(len(trees), len(trees) * size, device)
    merge_candidates(
        torch.tensor([3], device=device),
        token_ids.int()[:, None].to(device),
        parents.int()[:, None].to(device),
        scores[:, None].to(device),
        torch.tensor([[len(tree)] for tree in trees], device=device).int(),
        *merged,
    )
    columns = columns_of(merged, 3)
    return sorted(zip(*columns, strict=True))


def columns_of(merged: Merged, slot: int) -> list[list[float]]:
    """A slot's tokens, parents, best scores and proposers."""
    best = merged.own_scores.amax(0)
    columns = (merged.token_ids, merged.parents, best, merged.proposers)
    return [column[slot, : int(merged.num_merged[slot])].tolist() for column in columns]


def paths(token_ids: list[int], parents: list[int]) -> list[Path]:
    """Tokens from the root to each node. Fails unless parents precede children."""
    found: list[Path] = []
    for token_id, parent in zip(token_ids, parents, strict=True):
        assert parent < len(found), "a child precedes its parent"
        found.append((*found[parent], token_id) if parent >= 0 else (token_id,))
    return found


def expected_nodes(candidates: Candidates, req: int) -> dict[Path, tuple[float, int]]:
    """Path -> best score and proposer bits, with no notion of a merged index."""
    nodes: dict[Path, tuple[float, int]] = {}
    for proposer, num in enumerate(candidates.num_candidates[:, req].tolist()):
        proposed = paths(
            candidates.token_ids[proposer, req, :num].tolist(),
            candidates.parents[proposer, req, :num].tolist(),
        )
        scores = candidates.scores[proposer, req, :num].tolist()
        for path, score in zip(proposed, scores, strict=True):
            best, proposers = nodes.get(path, (-INF, 0))
            nodes[path] = (max(best, score), proposers | 1 << proposer)
    return nodes


@pytest.mark.parametrize("num_proposers", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 33, 65])
def test_matches_reference(size: int, num_proposers: int, device: torch.device):
    candidates = random_candidates(num_proposers, 3, size, vocab_size=3, device=device)
    max_num_merged = num_proposers * size + 5
    merged, expected = (
        outputs(num_proposers, max_num_merged, device) for _ in range(2)
    )
    merge_candidates(*candidates, *merged)
    reference(*candidates, *expected)
    torch.testing.assert_close(tuple(merged), tuple(expected), rtol=0, atol=0)


def test_matches_reference_at_full_size(device: torch.device):
    candidates = random_candidates(2, 1, 256, vocab_size=4, device=device)
    candidates.num_candidates.copy_(torch.tensor([[256], [40]]))
    merged, expected = outputs(2, 512, device), outputs(2, 512, device)
    merge_candidates(*candidates, *merged)
    reference(*candidates, *expected)
    torch.testing.assert_close(tuple(merged), tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize("vocab_size", [1, 2, 5])
def test_paths_are_the_union_of_the_proposers_paths(
    vocab_size: int, device: torch.device
):
    candidates = random_candidates(4, 3, 12, vocab_size, device)
    merged = outputs(4, 48, device)
    merge_candidates(*candidates, *merged)
    for req, slot in enumerate(candidates.slots.tolist()):
        token_ids, parents, scores, proposers = columns_of(merged, slot)
        found = zip(scores, proposers, strict=True)
        nodes = dict(zip(paths(token_ids, parents), found, strict=True))
        assert len(nodes) == len(parents), "two nodes of one path"
        assert nodes == expected_nodes(candidates, req)


def test_shared_prefixes_become_one(device: torch.device):
    # proposer 0:  5 -- 6        proposer 1:  5 -- 7        both:  5 -- 6
    #                                                                \- 7
    nodes = merge_trees(
        [[(5, -1, -1.0), (6, 0, -2.0)], [(5, -1, -0.5), (7, 0, -3.0)]], device
    )
    assert nodes == [(5, -1, -0.5, 0b11), (6, 0, -2.0, 0b01), (7, 0, -3.0, 0b10)]


def test_one_token_under_two_parents_stays_two_nodes(device: torch.device):
    # proposer 0:  5 -- 8        proposer 1:  6 -- 8
    nodes = merge_trees(
        [[(5, -1, -1.0), (8, 0, -2.0)], [(6, -1, -1.5), (8, 0, -0.5)]], device
    )
    assert nodes == [
        (5, -1, -1.0, 0b01),
        (6, -1, -1.5, 0b10),
        (8, 0, -2.0, 0b01),
        (8, 2, -0.5, 0b10),
    ]


def test_a_proposers_own_duplicates_become_one(device: torch.device):
    #   root
    #  /    \
    # 5      5
    # |      |
    # 6      7
    tree = [(5, -1, -3.0), (5, -1, -1.0), (6, 0, -1.0), (7, 1, -1.0)]
    nodes = merge_trees([tree], device)
    assert nodes == [(5, -1, -1.0, 0b1), (6, 0, -1.0, 0b1), (7, 0, -1.0, 0b1)]


def test_candidate_order_differs_between_proposers(device: torch.device):
    # both know 5 -- 6 and 7; proposer 1 lists them as 7, 5, 6
    nodes = merge_trees(
        [
            [(5, -1, -1.0), (6, 0, -1.0), (7, -1, -1.0)],
            [(7, -1, -1.0), (5, -1, -1.0), (6, 1, -1.0)],
        ],
        device,
    )
    assert nodes == [(5, -1, -1.0, 0b11), (6, 0, -1.0, 0b11), (7, -1, -1.0, 0b11)]


@pytest.mark.parametrize("first", [NAN, -2.0])
def test_nan_is_no_opinion(first: float, device: torch.device):
    second = -2.0 if first != first else NAN
    nodes = merge_trees([[(5, -1, first)], [(5, -1, second)]], device)
    assert nodes == [(5, -1, -2.0, 0b11)]


def test_nan_from_everyone_is_impossible(device: torch.device):
    assert merge_trees([[(5, -1, NAN)]], device) == [(5, -1, -INF, 0b1)]


def test_one_token_under_two_parents_keeps_two_scores(device: torch.device):
    # 6 after 5 does not inherit the score of 6 after 7
    tree = [(5, -1, -1.0), (7, -1, -1.0), (6, 0, -4.0), (6, 1, -1.5)]
    assert merge_trees([tree], device)[1:3] == [(6, 0, -4.0, 1), (6, 1, -1.5, 1)]


def test_no_candidates_are_no_nodes(device: torch.device):
    candidates = random_candidates(2, 1, 4, vocab_size=3, device=device)
    candidates.num_candidates.zero_()
    merged = outputs(2, 8, device)
    merge_candidates(*candidates, *merged)
    assert merged.num_merged.tolist() == [STALE] * 4 + [0]
    assert (merged.sibling_bits == STALE).all()
    assert (merged.token_ids == STALE).all()
    assert (merged.own_scores[:, 4] == -INF).all()


def test_everyone_keeps_a_score_of_its_own(device: torch.device):
    # both know 5; 6 comes from the second alone, which scores 5 twice
    candidates = Candidates(
        torch.tensor([1], device=device),
        torch.tensor([[[5, 0, 0]], [[6, 5, 5]]], device=device).int(),
        torch.full((2, 1, 3), -1, device=device).int(),
        torch.tensor([[[-1.0, 0.0, 0.0]], [[-2.0, -4.0, -3.0]]], device=device),
        torch.tensor([[1], [3]], device=device).int(),
    )
    merged = outputs(2, 6, device)
    merge_candidates(*candidates, *merged)
    assert merged.token_ids[1, :2].tolist() == [5, 6]
    assert merged.own_scores[:, 1].tolist() == [
        [-1.0, -INF, -INF, -INF, -INF, -INF],
        [-3.0, -2.0, -INF, -INF, -INF, -INF],
    ]


def test_siblings_are_known_by_who_proposes_any(device: torch.device):
    # 0:  5 -- 6 -- 8      1:  5 -- 7      2:  5      3: nothing
    #                           \- 9          9
    trees: list[Tree] = [
        [(5, -1, -1.0), (6, 0, -1.0), (8, 1, -1.0)],
        [(5, -1, -1.0), (7, 0, -1.0), (9, 0, NAN)],
        [(5, -1, -1.0), (9, -1, -1.0)],
        [],
    ]
    assert siblings_of(trees, device) == {
        (5,): 0b111,
        (9,): 0b111,
        (5, 6): 0b011,
        (5, 7): 0b011,
        (5, 9): 0b011,
        (5, 6, 8): 0b001,
    }


def siblings_of(trees: list[Tree], device: torch.device) -> dict[Path, int]:
    size = max(map(len, trees))
    padded = [tree + [(STALE, STALE, NAN)] * (size - len(tree)) for tree in trees]
    token_ids, parents, scores = torch.tensor(padded).permute(2, 0, 1).contiguous()
    merged = outputs(len(trees), len(trees) * size, device)
    merge_candidates(
        torch.tensor([3], device=device),
        token_ids.int()[:, None].to(device),
        parents.int()[:, None].to(device),
        scores[:, None].to(device),
        torch.tensor([[len(tree)] for tree in trees], device=device).int(),
        *merged,
    )
    token_ids, parents, *_ = columns_of(merged, 3)
    bits = merged.sibling_bits[3, : len(parents)].tolist()
    return dict(zip(paths(token_ids, parents), bits, strict=True))


def test_thirty_one_proposers_have_a_bit_each(device: torch.device):
    nodes = merge_trees([[(5, -1, -1.0)] for _ in range(31)], device)
    assert nodes == [(5, -1, -1.0, (1 << 31) - 1)]


def narrowed(merged: Merged) -> Merged:
    return Merged(*(out[..., :14] if out.ndim > 1 else out for out in merged))


def test_reads_and_writes_views_of_wider_buffers(device: torch.device):
    narrow = random_candidates(2, 3, 7, vocab_size=2, device=device)
    wide = [torch.full((4, 5, 11), STALE, device=device).int() for _ in range(2)]
    candidates = Candidates(
        narrow.slots,
        *(each[::2, 1:4, 2:9] for each in wide),
        torch.full((4, 5, 11), NAN, device=device)[::2, 1:4, 2:9],
        torch.full((2, 8), STALE, device=device).int()[:, 2:5],
    )
    for view, tensor in zip(candidates, narrow, strict=True):
        view.copy_(tensor.clone())
    buffer, expected = outputs(2, 30, device), outputs(2, 30, device)
    merge_candidates(*candidates, *narrowed(buffer))
    reference(*candidates, *narrowed(expected))
    torch.testing.assert_close(tuple(buffer), tuple(expected), rtol=0, atol=0)


def test_chains_share_their_common_prefix(device: torch.device):
    # 0 .. 39 once, then a fork at 20
    size = 40
    parents = chain_parents(1, size).expand(2, 1, size).contiguous()
    token_ids = torch.arange(size, dtype=torch.int32).repeat(2, 1, 1)
    token_ids[1, 0, 20:] += 100
    counts = torch.full((2, 1), size, dtype=torch.int32)
    slots, scores = torch.tensor([2]), -torch.ones(2, 1, size)
    candidates = Candidates(slots, token_ids, parents, scores, counts)
    merged = outputs(2, 2 * size, device)
    merge_candidates(*(tensor.to(device) for tensor in candidates), *merged)
    assert merged.num_merged[2] == 60
    assert merged.parents[2, 40:42].tolist() == [19, 40]


@pytest.mark.parametrize(
    ("num_proposers", "max_num_merged", "message"),
    [
        (32, 64, r"32 proposers, must be in \[1, 31\]"),
        (2, 7, "2 proposers of 4 candidates.*merged_token_ids has 7"),
    ],
)
def test_rejects_impossible_shapes(
    num_proposers: int, max_num_merged: int, message: str, device: torch.device
):
    candidates = random_candidates(num_proposers, 1, 4, vocab_size=2, device=device)
    with pytest.raises(ValueError, match=message):
        merge_candidates(*candidates, *outputs(num_proposers, max_num_merged, device))


def test_rejects_columns_of_different_strides(device: torch.device):
    candidates = random_candidates(1, 2, 4, vocab_size=2, device=device)
    merged, wide = outputs(1, 4, device), outputs(1, 6, device)
    with pytest.raises(ValueError, match="one shape and one stride"):
        merge_candidates(*candidates, *merged._replace(parents=wide.parents[:, :4]))
