"""kernels/label_candidates.py against its reference and against sets of paths."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_treespec.kernels.label_candidates import label_candidates
from vllm_treespec.kernels.reference.label_candidates import (
    label_candidates as reference,
)
from vllm_treespec.testing.trees import chain_parents, random_parents

STALE = -7
POISON = 1 << 30  # a parent that nobody may follow


class Inputs(NamedTuple):
    token_ids: torch.Tensor
    parents: torch.Tensor
    num_candidates: torch.Tensor
    emitted: torch.Tensor
    num_emitted: torch.Tensor


def int32(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def empty_labels(inputs: Inputs) -> torch.Tensor:
    return torch.full_like(inputs.token_ids, STALE, dtype=torch.int8)


def random_inputs(
    num_proposers: int,
    num_rows: int,
    size: int,
    device: torch.device,
    *,
    max_num_emitted: int = 6,
    chains: bool = False,
) -> Inputs:
    """Two tokens only, so that targets and trees agree for a while. Stale columns hold
    the right token under a parent that does not exist."""
    gen = torch.Generator().manual_seed(size)

    def randint(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=gen, dtype=torch.int32)

    trees = [
        chain_parents(num_rows, size + 1)
        if chains
        else random_parents(num_rows, size + 1, seed)
        for seed in range(num_proposers)
    ]
    parents = (torch.stack(trees)[:, :, 1:] - 1).contiguous()
    num_candidates = randint(size + 1, num_proposers, num_rows)
    num_candidates[0, 0] = size
    parents[torch.arange(size) >= num_candidates[..., None]] = POISON
    inputs = Inputs(
        randint(2, num_proposers, num_rows, size),
        parents,
        num_candidates,
        randint(2, num_rows, max_num_emitted).long(),
        randint(max_num_emitted + 1, num_rows),
    )
    return Inputs(*(tensor.to(device) for tensor in inputs))


def label_one(
    parents: list[int], token_ids: list[int], emitted: list[int], device: torch.device
) -> list[int]:
    """The labels of one tree; past what was emitted come the same tokens again."""
    labels = torch.full((1, 1, len(parents)), STALE, dtype=torch.int8, device=device)
    label_candidates(
        int32([[token_ids]], device),
        int32([[parents]], device),
        int32([[len(parents)]], device),
        torch.tensor([[*emitted, *token_ids]], device=device),
        int32([len(emitted)], device),
        labels,
    )
    return labels[0, 0].tolist()


def expected_labels(inputs: Inputs) -> list[list[list[int]]]:
    """By whole paths, with no notion of a depth or of a parent's label."""
    labels = []
    for parents, token_ids, counts in zip(
        inputs.parents.tolist(),
        inputs.token_ids.tolist(),
        inputs.num_candidates.tolist(),
        strict=True,
    ):
        rows = []
        for row, num in enumerate(counts):
            said = inputs.emitted[row, : inputs.num_emitted[row]].tolist()
            beginnings = [said[:length] for length in range(1, len(said) + 1)]
            paths: list[list[int]] = []
            for parent, token_id in zip(
                parents[row][:num], token_ids[row], strict=False
            ):
                paths.append([*(paths[parent] if parent >= 0 else []), token_id])
            found = [
                1 if path in beginnings else -1 if path[: len(said)] == said else 0
                for path in paths
            ]
            rows.append(found + [-1] * (len(parents[row]) - num))
        labels.append(rows)
    return labels


def check(inputs: Inputs) -> None:
    labels, expected = empty_labels(inputs), empty_labels(inputs)
    label_candidates(*inputs, labels)
    reference(*inputs, expected)
    assert labels.tolist() == expected.tolist() == expected_labels(inputs)


@pytest.mark.parametrize("num_proposers", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 33, 65, 200])
def test_matches_reference(size: int, num_proposers: int, device: torch.device):
    check(random_inputs(num_proposers, 4, size, device))


def test_matches_reference_at_full_size(device: torch.device):
    check(random_inputs(2, 2, 512, device, max_num_emitted=40))


def test_a_sweep_sees_every_label(device: torch.device):
    labels = torch.tensor(expected_labels(random_inputs(3, 4, 65, device)))
    assert {-1, 0, 1} == set(labels.flatten().tolist())


@pytest.mark.parametrize("max_num_emitted", [1, 5, 300])
def test_chains_are_climbed_to_the_root(max_num_emitted: int, device: torch.device):
    inputs = random_inputs(
        2, 3, 130, device, max_num_emitted=max_num_emitted, chains=True
    )
    # the first chain is right as far as it goes
    length = min(130, max_num_emitted)
    inputs.emitted[0, :length] = inputs.token_ids[0, 0, :length]
    inputs.num_emitted[0] = max_num_emitted
    check(inputs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tree_has_the_labels_of_its_paths(data: st.DataObject):
    size = data.draw(st.integers(1, 40))
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(size)]
    tokens = st.integers(0, 2)
    inputs = Inputs(
        torch.tensor([[data.draw(st.lists(tokens, min_size=size, max_size=size))]]),
        torch.tensor([[parents]]),
        torch.tensor([[data.draw(st.integers(0, size))]]),
        torch.tensor([data.draw(st.lists(tokens, min_size=8, max_size=8))]),
        torch.tensor([data.draw(st.integers(0, 8))]),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(Inputs(*(tensor.int().to(device) for tensor in inputs)))


# token ids:      root
#                /    \
#          0: 10      1: 20
#          /    \        \
#     2: 30    3: 40    4: 30
#       |
#     5: 60
PARENTS = [-1, -1, 0, 0, 1, 2]
TOKEN_IDS = [10, 20, 30, 40, 30, 60]


@pytest.mark.parametrize(
    ("emitted", "labels"),
    [
        ([10, 30, 60, 9], [1, 0, 1, 0, 0, 1]),
        ([10, 30, 9], [1, 0, 1, 0, 0, 0]),
        ([20, 30], [0, 1, 0, 0, 1, 0]),
        # 60 may yet come
        ([10, 30], [1, 0, 1, 0, 0, -1]),
        # so may 30 and 40 after 10, but nothing after 20
        ([10], [1, 0, -1, -1, 0, -1]),
        # right at its depth, but the way there was wrong
        ([9, 30, 60], [0, 0, 0, 0, 0, 0]),
        ([], [-1, -1, -1, -1, -1, -1]),
    ],
)
def test_a_label_is_about_the_whole_path(
    emitted: list[int], labels: list[int], device: torch.device
):
    assert label_one(PARENTS, TOKEN_IDS, emitted, device) == labels


def test_a_chain_deeper_than_what_was_emitted_ends_unknown(device: torch.device):
    parents = chain_parents(1, 9)[0].tolist()
    tokens = list(range(50, 59))
    assert label_one(parents, tokens, [50, 51, 52], device) == [1] * 3 + [-1] * 6
    assert label_one(parents, tokens, [50, 99, 52], device) == [1] + [0] * 8


def test_two_siblings_of_one_token_are_both_right(device: torch.device):
    assert label_one([-1, -1, 1], [5, 5, 6], [5, 6], device) == [1, 1, 1]


def test_rows_and_proposers_do_not_mix(device: torch.device):
    # one tree for all; every row says something else, every proposer knows less
    inputs = Inputs(
        int32([TOKEN_IDS, TOKEN_IDS, TOKEN_IDS], device).expand(2, 3, 6).contiguous(),
        int32([PARENTS, PARENTS, PARENTS], device).expand(2, 3, 6).contiguous(),
        int32([[6, 5, 6], [2, 0, 3]], device),
        torch.tensor([[10, 40], [20, 30], [20, 9]], device=device),
        int32([2, 1, 2], device),
    )
    labels = empty_labels(inputs)
    label_candidates(*inputs, labels)
    assert labels.tolist() == [
        [[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, -1, -1], [0, 1, 0, 0, 0, 0]],
        [[1, 0, -1, -1, -1, -1], [-1] * 6, [0, 1, 0, -1, -1, -1]],
    ]


def test_token_ids_are_compared_in_full(device: torch.device):
    # the last one would be 7 in 32 bits
    assert label_one([-1], [7], [7 + (1 << 32)], device) == [0]


def test_reads_and_writes_views_of_wider_buffers(device: torch.device):
    narrow = random_inputs(2, 3, 37, device)
    inputs = Inputs(
        torch.full((4, 5, 50), STALE, device=device).int()[::2, 1:4, 5:42],
        torch.full((2, 4, 41), POISON, device=device).int()[:, :3, 2:39],
        torch.full((2, 8), 37, device=device).int()[:, 2:5],
        torch.full((6, 9), STALE, device=device)[::2, 1:7],
        torch.full((9,), 6, device=device).int()[4:7],
    )
    for view, tensor in zip(inputs, narrow, strict=True):
        view.copy_(tensor)
    buffer = torch.full((3, 4, 60), STALE, dtype=torch.int8, device=device)
    expected = buffer.clone()
    label_candidates(*inputs, buffer[1:, 1:4, 3:40])
    reference(*narrow, expected[1:, 1:4, 3:40])
    assert torch.equal(buffer, expected)


def test_rows_may_be_fewer_than_the_emitted_ones(device: torch.device):
    inputs = random_inputs(1, 3, 7, device)
    expected = empty_labels(inputs)
    reference(*inputs, expected)
    first = Inputs(*(tensor[:, :2] for tensor in inputs[:3]), *inputs[3:])
    for labels_of in (label_candidates, reference):
        labels = empty_labels(inputs)
        labels_of(*first, labels[:, :2])
        assert torch.equal(labels[:, :2], expected[:, :2])
        assert (labels[:, 2:] == STALE).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parents": torch.zeros(2, 3, 8).int()}, r"parents \(2, 3, 8\)"),
        ({"num_candidates": torch.zeros(3, 2).int()}, r"num_candidates \(3, 2\)"),
        ({"emitted": torch.zeros(2, 6).long()}, "shorter than 3 rows"),
        ({"num_emitted": torch.zeros(2).int()}, "shorter than 3 rows"),
        ({"emitted": torch.zeros(6, 3).long().T}, "must be contiguous"),
    ],
)
def test_rejects_shapes_that_do_not_fit(
    changes: dict[str, torch.Tensor], message: str, device: torch.device
):
    inputs = random_inputs(2, 3, 7, device)
    changes = {name: tensor.to(device) for name, tensor in changes.items()}
    with pytest.raises(ValueError, match=message):
        label_candidates(*inputs._replace(**changes), empty_labels(inputs))


def test_rejects_labels_of_another_shape(device: torch.device):
    inputs = random_inputs(2, 3, 7, device)
    with pytest.raises(ValueError, match=r"labels \(2, 3, 6\)"):
        label_candidates(*inputs, empty_labels(inputs)[..., :6])
