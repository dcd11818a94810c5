"""kernels/tally_candidates.py against its reference and against sets of paths."""

import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_treespec.kernels.bins import BIN_WIDTH, NUM_BINS, NUM_COMPANIES
from vllm_treespec.kernels.reference.tally_candidates import (
    tally_candidates as reference,
)
from vllm_treespec.kernels.tally_candidates import tally_candidates
from vllm_treespec.testing.trees import chain_parents, random_parents

NAN, INF = float("nan"), float("inf")
POISON = 1 << 30  # a parent that nobody may follow
MAX_NUM_REQS, MAX_NUM_TOKENS = 7, 330


class Inputs(NamedTuple):
    slots: torch.Tensor
    merged_token_ids: torch.Tensor
    merged_parents: torch.Tensor
    proposers: torch.Tensor
    own_scores: torch.Tensor
    num_merged: torch.Tensor
    offering: torch.Tensor
    token_ids: torch.Tensor
    num_tokens: torch.Tensor
    num_emitted: torch.Tensor


def int32(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def empty_counts(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What was counted before stays, so it is no integer and differs by bin."""
    rows = inputs.own_scores.shape[0] * NUM_COMPANIES
    before = torch.arange(rows * NUM_BINS, device=inputs.slots.device) + 0.5
    right = before.float().view(rows, NUM_BINS)
    return right, right + 1000


def random_inputs(
    num_proposers: int,
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

    shape = (MAX_NUM_REQS, size)
    trees = (chain_parents if chains else random_parents)(MAX_NUM_REQS, size + 1)
    parents = (trees[:, 1:] - 1).contiguous()
    num_merged = randint(size + 1, MAX_NUM_REQS)
    num_merged[5] = size
    parents[torch.arange(size) >= num_merged[:, None]] = POISON
    everybody = (1 << num_proposers) - 1
    proposers = 1 + randint(everybody, *shape)
    scores = -14 * torch.rand(num_proposers, *shape, generator=gen)
    kind = torch.rand(scores.shape, generator=gen)
    for bound, odd in ((0.04, NAN), (0.08, -INF), (0.1, INF), (0.14, 0.0), (0.16, 2.0)):
        scores[(kind < bound) & (kind >= bound - 0.04)] = odd
    own = 1 << torch.arange(num_proposers)[:, None, None]
    scores[(proposers & own) == 0] = -INF
    offering = 1 + randint(everybody, MAX_NUM_REQS)
    offering[::2] = 0  # as if each were alone
    inputs = Inputs(
        torch.tensor([5, 0, 3, 6]),
        randint(2, *shape),
        parents,
        proposers,
        scores,
        num_merged,
        offering,
        randint(2, MAX_NUM_REQS, MAX_NUM_TOKENS),
        max_num_emitted + 1 + randint(9, MAX_NUM_REQS),
        randint(max_num_emitted + 1, 4),
    )
    return Inputs(*(tensor.to(device) for tensor in inputs))


def expected_labels(inputs: Inputs, row: int) -> list[int]:
    """By whole paths, with no notion of a depth or of a parent's label."""
    slot = int(inputs.slots[row])
    end, num = int(inputs.num_tokens[slot]), int(inputs.num_merged[slot])
    said = inputs.token_ids[slot, end - int(inputs.num_emitted[row]) : end].tolist()
    beginnings = [said[:length] for length in range(1, len(said) + 1)]
    paths: list[list[int]] = []
    for parent, token_id in zip(
        inputs.merged_parents[slot, :num].tolist(),
        inputs.merged_token_ids[slot, :num].tolist(),
        strict=True,
    ):
        paths.append([*(paths[parent] if parent >= 0 else []), token_id])
    return [
        1 if path in beginnings else -1 if path[: len(said)] == said else 0
        for path in paths
    ]


def expected_counts(inputs: Inputs) -> tuple[Counter, Counter]:
    right, known = Counter(), Counter()
    for row, slot in enumerate(inputs.slots.tolist()):
        offering = int(inputs.offering[slot])
        for node, label in enumerate(expected_labels(inputs, row)):
            bits = int(inputs.proposers[slot, node])
            for proposer, scores in enumerate(inputs.own_scores[:, slot, node]):
                score, others = float(scores), ~(1 << proposer)
                if label < 0 or not math.isfinite(score):
                    continue
                company = 2 if bits & others else 1 if offering & others else 0
                place = min(max(int(-score // BIN_WIDTH), 0), NUM_BINS - 1)
                known[proposer * NUM_COMPANIES + company, place] += 1
                right[proposer * NUM_COMPANIES + company, place] += label
    return +right, +known


def added(counts: torch.Tensor, before: torch.Tensor) -> Counter:
    """Row and bin -> what was added."""
    found = (counts - before).cpu()
    places = found.nonzero().tolist()
    return Counter({(row, place): int(found[row, place]) for row, place in places})


def check(inputs: Inputs) -> None:
    found, expected = empty_counts(inputs), empty_counts(inputs)
    tally_candidates(*inputs, *found)
    reference(*inputs, *expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    before = empty_counts(inputs)
    new = tuple(map(added, found, before))
    assert new == expected_counts(inputs)


@pytest.mark.parametrize("num_proposers", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 33, 65, 200])
def test_matches_reference(size: int, num_proposers: int, device: torch.device):
    check(random_inputs(num_proposers, size, device))


def test_matches_reference_at_full_size(device: torch.device):
    check(random_inputs(2, 512, device, max_num_emitted=40))


def test_a_sweep_sees_every_label_and_company(device: torch.device):
    inputs = random_inputs(3, 65, device)
    assert {-1, 0, 1} == {
        label for row in range(4) for label in expected_labels(inputs, row)
    }
    _, known = expected_counts(inputs)
    assert len({row for row, _ in known}) == 3 * NUM_COMPANIES


@pytest.mark.parametrize("max_num_emitted", [1, 5, 300])
def test_chains_are_climbed_to_the_root(max_num_emitted: int, device: torch.device):
    inputs = random_inputs(2, 130, device, max_num_emitted=max_num_emitted, chains=True)
    # the first chain is right as far as it goes
    length = min(130, max_num_emitted)
    first = int(inputs.num_tokens[5]) - max_num_emitted
    inputs.token_ids[5, first : first + length] = inputs.merged_token_ids[5, :length]
    inputs.num_emitted[0] = max_num_emitted
    check(inputs)


def label_one(
    parents: list[int], token_ids: list[int], emitted: list[int], device: torch.device
) -> list[int]:
    """The labels of one proposer's tree, told apart by a bin for each node. Past what
    was emitted the text holds the same tokens again."""
    size = len(parents)
    text = torch.tensor([[77, *emitted, *token_ids]], device=device)
    own_scores = -BIN_WIDTH * (torch.arange(size, device=device) + 0.5)
    right, known = torch.zeros(2, NUM_COMPANIES, NUM_BINS, device=device)
    tally_candidates(
        int32([0], device),
        int32([token_ids], device),
        int32([parents], device),
        int32([[1] * size], device),
        own_scores[None, None],
        int32([size], device),
        int32([1], device),
        text,
        int32([1 + len(emitted)], device),
        int32([len(emitted)], device),
        right,
        known,
    )
    assert not known[1:].any()
    pairs = zip(right[0, :size].tolist(), known[0, :size].tolist(), strict=True)
    return [int(right) if known else -1 for right, known in pairs]


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


def test_token_ids_are_compared_in_full(device: torch.device):
    # the last one would be 7 in 32 bits
    assert label_one([-1], [7], [7 + (1 << 32)], device) == [0]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_tree_has_the_labels_of_its_paths(data: st.DataObject):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = data.draw(st.integers(1, 40))
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(size)]
    tokens = st.integers(0, 2)
    token_ids = data.draw(st.lists(tokens, min_size=size, max_size=size))
    emitted = data.draw(st.lists(tokens, max_size=8))
    one = torch.ones(1, 1, dtype=torch.int32)
    inputs = Inputs(
        torch.tensor([0]),
        int32([token_ids], device),
        int32([parents], device),
        one.expand(1, size).contiguous(),
        -0.3 * torch.arange(size).view(1, 1, size),
        int32([data.draw(st.integers(0, size))], device),
        one[0],
        int32([[*emitted, *token_ids]], device),
        int32([len(emitted)], device),
        int32([len(emitted)], device),
    )
    check(Inputs(*(tensor.to(device) for tensor in inputs)))


def test_slots_do_not_mix_and_those_without_a_row_count_nothing(device: torch.device):
    inputs = random_inputs(2, 33, device)
    for row in range(4):
        check(
            inputs._replace(
                slots=inputs.slots[row : row + 1],
                num_emitted=inputs.num_emitted[row : row + 1],
            )
        )


def test_reads_views_of_wider_buffers(device: torch.device):
    narrow = random_inputs(2, 37, device)
    buffers = [
        torch.full((2 * MAX_NUM_REQS, 50), POISON, device=device).int()
        for _ in range(3)
    ]
    scores = torch.full((4, 2 * MAX_NUM_REQS, 50), NAN, device=device)
    views = (*(buffer[::2, 5:42] for buffer in buffers), scores[::2, ::2, 5:42])
    text = torch.full((MAX_NUM_REQS, MAX_NUM_TOKENS + 9), 1, device=device).int()
    inputs = Inputs(
        narrow.slots, *views, *narrow[5:7], text[:, :MAX_NUM_TOKENS], *narrow[8:]
    )
    for view, tensor in zip(inputs, narrow, strict=True):
        view.copy_(tensor.clone())
    check(inputs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("merged_parents", "one shape and one stride"),
        ("num_emitted", "num_emitted is shorter than 4 rows"),
        ("offering", "num_merged and offering must have 7 slots"),
        ("num_tokens", "6 lengths of 7 texts"),
    ],
)
def test_rejects_shapes_that_do_not_fit(name: str, message: str, device: torch.device):
    inputs = random_inputs(2, 7, device)
    shorter = inputs._replace(**{name: getattr(inputs, name)[:-1]})
    with pytest.raises(ValueError, match=message):
        tally_candidates(*shorter, *empty_counts(inputs))


def test_rejects_counts_of_other_companies(device: torch.device):
    inputs = random_inputs(2, 7, device)
    right, known = empty_counts(inputs)
    with pytest.raises(ValueError, match=r"known \(5, 48\)"):
        tally_candidates(*inputs, right, known[:5])
