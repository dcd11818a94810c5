"""kernels/walk_tree.py against its reference."""

from typing import NamedTuple

import pytest
import torch

from vllm_treespec.kernels.bins import NUM_RANKS
from vllm_treespec.kernels.reference.count_step import count_step
from vllm_treespec.kernels.reference.walk_tree import walk_tree as reference
from vllm_treespec.kernels.walk_tree import walk_tree
from vllm_treespec.testing.trees import chain_parents, random_parents

STALE = -7


class Walk(NamedTuple):
    sampled: torch.Tensor
    num_sampled: torch.Tensor
    paths: torch.Tensor
    path_lens: torch.Tensor


def int32(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def outputs(num_rows: int, max_num_nodes: int, device: torch.device) -> Walk:
    counts = torch.full((num_rows,), STALE, dtype=torch.int32, device=device)
    paths = torch.full(
        (num_rows, max_num_nodes), STALE, dtype=torch.int32, device=device
    )
    return Walk(paths.long(), counts, paths, counts.clone())


def prefix_sums(counts: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


def walk_one(
    parents: list[int],
    token_ids: list[int],
    target_ids: list[int],
    device: torch.device,
    num_nodes: int | None = None,
) -> tuple[list[int], list[int]]:
    """Sampled tokens and path of slot 1's tree, scheduled as far as target_ids go."""
    size = len(parents)
    walk = outputs(1, size, device)
    walk_tree(
        int32([1], device),
        prefix_sums([len(target_ids)], device),
        torch.tensor(target_ids, dtype=torch.int64, device=device),
        int32([[9] * size, token_ids], device),
        int32([[-1] + [0] * (size - 1), parents], device),
        int32([size, size if num_nodes is None else num_nodes], device),
        *walk,
    )
    num_sampled, path_len = int(walk.num_sampled[0]), int(walk.path_lens[0])
    assert path_len == max(num_sampled - 1, 0)
    assert (walk.sampled[0, num_sampled:] == 0).all()
    return walk.sampled[0, :num_sampled].tolist(), walk.paths[
        0, : path_len + 1
    ].tolist()


# token ids:      root
#                /    \
#          1: 10      2: 20
#          /    \        \
#     3: 30    4: 40    5: 30
#       |
#     6: 60
PARENTS = [-1, 0, 0, 1, 1, 2, 3]
TOKEN_IDS = [0, 10, 20, 30, 40, 30, 60]


@pytest.mark.parametrize("max_num_nodes", [1, 2, 7, 33, 65, 200])
def test_matches_reference(max_num_nodes: int, device: torch.device):
    # two tokens only, so that the target often agrees and siblings often collide
    gen = torch.Generator().manual_seed(max_num_nodes)
    num_row_nodes = [max_num_nodes, 0, max_num_nodes // 2, max_num_nodes, 1]
    num_nodes = [max_num_nodes, 1, max_num_nodes // 3 + 1, 1, *[max_num_nodes] * 3]
    arguments = (
        int32([5, 3, 0, 2, 6], device),
        prefix_sums(num_row_nodes, device),
        torch.randint(2, (sum(num_row_nodes),), generator=gen).to(device),
        torch.randint(2, (7, max_num_nodes), generator=gen).int().to(device),
        random_parents(7, max_num_nodes).to(device),
        int32(num_nodes, device),
    )
    # rows past the batch belong to nobody and must stay as they are
    walk, expected = (
        outputs(6, max_num_nodes, device),
        outputs(6, max_num_nodes, device),
    )
    walk_tree(*arguments, *walk)
    reference(*arguments, *expected)
    torch.testing.assert_close(tuple(walk), tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize("num_proposers", [1, 3])
@pytest.mark.parametrize("max_num_nodes", [1, 2, 33, 65, 200])
def test_counts_what_it_walked(
    max_num_nodes: int, num_proposers: int, device: torch.device
):
    gen = torch.Generator().manual_seed(max_num_nodes)
    num_row_nodes = [max_num_nodes, 0, max_num_nodes // 2, max_num_nodes, 1]
    num_nodes = [max_num_nodes, 1, max_num_nodes // 3 + 1, 1, *[max_num_nodes] * 3]
    # more tokens, so that not every path takes first children
    slots, cu_num_logits, *tree = (
        int32([5, 3, 0, 2, 6], device),
        prefix_sums(num_row_nodes, device),
        torch.randint(5, (sum(num_row_nodes),), generator=gen).to(device),
        torch.randint(5, (7, max_num_nodes), generator=gen).int().to(device),
        random_parents(7, max_num_nodes).clamp(max=5).to(device),
        int32(num_nodes, device),
    )
    shape = (7, max_num_nodes)
    bits = torch.randint(1, 1 << num_proposers, shape, generator=gen)
    proposers = bits.int().to(device)
    walk = outputs(5, max_num_nodes, device)
    wide = torch.full((5, 32), STALE, dtype=torch.int64, device=device)
    counts = wide[:, 4 : 6 + NUM_RANKS + 3 * num_proposers]
    walk_tree(slots, cu_num_logits, *tree, *walk, proposers, counts)
    expected = torch.zeros_like(counts)
    count_step(
        *(slots, cu_num_logits, tree[3], tree[2], proposers),
        *(walk.paths, walk.path_lens, expected),
    )
    assert torch.equal(counts, expected)
    assert (wide[:, :4] == STALE).all() and (
        wide[:, counts.shape[1] + 4 :] == STALE
    ).all()
    if max_num_nodes > 2:
        assert expected[:, 2 : 1 + NUM_RANKS].sum() > 0


def test_follows_the_target_to_a_leaf_and_adds_a_bonus(device: torch.device):
    target_ids = [10, 30, 99, 60, 99, 99, 77]
    sampled, path = walk_one(PARENTS, TOKEN_IDS, target_ids, device)
    assert (sampled, path) == ([10, 30, 60, 77], [0, 1, 3, 6])


def test_stops_where_the_target_leaves_the_tree(device: torch.device):
    target_ids = [20, 99, 50, 99, 99, 99, 99]
    sampled, path = walk_one(PARENTS, TOKEN_IDS, target_ids, device)
    assert (sampled, path) == ([20, 50], [0, 2])


def test_a_cousin_with_the_right_token_is_no_child(device: torch.device):
    # after 20 the target says 40, which only follows 10
    target_ids = [20, 99, 40, 99, 99, 99, 99]
    sampled, path = walk_one(PARENTS, TOKEN_IDS, target_ids, device)
    assert (sampled, path) == ([20, 40], [0, 2])


def test_the_root_is_nobodys_child(device: torch.device):
    # the target says 0, which is what the unused token of the root holds
    sampled, path = walk_one(PARENTS, TOKEN_IDS, [0] * 7, device)
    assert (sampled, path) == ([0], [0])


def test_nodes_that_were_not_scheduled_are_never_accepted(device: torch.device):
    # cut to 0 -- 1, 2: node 3 would have been next
    sampled, path = walk_one(PARENTS, TOKEN_IDS, [10, 30, 99], device)
    assert (sampled, path) == ([10, 30], [0, 1])


def test_nodes_that_were_not_built_are_never_accepted(device: torch.device):
    target_ids = [10, 30, 99, 60, 99, 99, 77]
    sampled, path = walk_one(PARENTS, TOKEN_IDS, target_ids, device, num_nodes=3)
    assert (sampled, path) == ([10, 30], [0, 1])


def test_a_slot_without_a_tree_still_samples(device: torch.device):
    sampled, path = walk_one(PARENTS, TOKEN_IDS, [10] * 7, device, num_nodes=0)
    assert (sampled, path) == ([10], [0])


def test_the_first_of_equal_siblings_wins(device: torch.device):
    #   root
    #  /    \
    # 1: 8   2: 8
    #          |
    #        3: 5
    sampled, path = walk_one([-1, 0, 0, 2], [0, 8, 8, 5], [8, 5, 5, 5], device)
    assert (sampled, path) == ([8, 5], [0, 1])


def test_tokens_compare_in_64_bits(device: torch.device):
    target = 10 + (1 << 32)
    sampled, path = walk_one([-1, 0], [0, 10], [target, 99], device)
    assert (sampled, path) == ([target], [0])


def test_a_row_without_logits_samples_nothing(device: torch.device):
    sampled, path = walk_one(PARENTS, TOKEN_IDS, [], device)
    assert (sampled, path) == ([], [0])


def test_a_whole_chain_can_be_accepted(device: torch.device):
    size = 70
    parents = chain_parents(1, size)[0].tolist()
    target_ids = list(range(100, 100 + size))
    sampled, path = walk_one(parents, [0, *target_ids[:-1]], target_ids, device)
    assert (sampled, path) == (target_ids, list(range(size)))


def test_reads_and_writes_views_of_wider_buffers(device: torch.device):
    # a stride of its own for every buffer
    sampled, paths = outputs(3, 20, device).sampled, outputs(3, 18, device).paths
    counts = outputs(2, 7, device)
    token_ids = torch.full((2, 16), 10, dtype=torch.int32, device=device)
    parents = torch.zeros(2, 24, dtype=torch.int32, device=device)
    token_ids[1, :7], parents[1, :7] = int32(TOKEN_IDS, device), int32(PARENTS, device)
    walk_tree(
        int32([1, 1, 0, 0], device)[:2],
        prefix_sums([7, 3], device),
        torch.tensor([10, 40, 0, 0, 5, 0, 0, 20, 0, 6], device=device),
        token_ids[:, :7],
        parents[:, :7],
        int32([0, 7], device),
        sampled[:, :7],
        counts.num_sampled,
        paths[:, :7],
        counts.path_lens,
    )
    assert sampled[0].tolist() == [10, 40, 5, 0, 0, 0, 0] + [STALE] * 13
    assert sampled[1].tolist() == [20, 6, 0, 0, 0, 0, 0] + [STALE] * 13
    assert paths[0].tolist() == [0, 1, 4, 0, 0, 0, 0] + [STALE] * 11
    assert paths[1].tolist() == [0, 2, 0, 0, 0, 0, 0] + [STALE] * 11
    assert (sampled[2] == STALE).all() and (paths[2] == STALE).all()


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "num_sums", "message"),
    [
        (2, 8, 4, r"sampled \(2, 8\), expected at least 3 rows of 8 nodes"),
        (3, 7, 4, r"sampled \(3, 7\), expected at least 3 rows of 8 nodes"),
        (3, 8, 3, "3 requests need 4 prefix sums"),
    ],
)
def test_rejects_impossible_shapes(
    num_rows: int, num_columns: int, num_sums: int, message: str, device: torch.device
):
    parents = random_parents(4, 8).to(device)
    with pytest.raises(ValueError, match=message):
        walk_tree(
            int32([0, 1, 2], device),
            int32([0] * num_sums, device),
            torch.zeros(1, dtype=torch.int64, device=device),
            parents,
            parents,
            int32([8] * 4, device),
            *outputs(num_rows, num_columns, device),
        )
