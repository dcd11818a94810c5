"""kernels/rate_candidates.py against its reference and one node at a time."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from vllm_treespec.kernels.bins import BIN_WIDTH, NUM_BINS, NUM_COMPANIES, SLOPE
from vllm_treespec.kernels.rate_candidates import rate_candidates
from vllm_treespec.kernels.reference.rate_candidates import (
    rate_candidates as reference,
)

NAN, INF = float("nan"), float("inf")
MAX_NUM_REQS = 7
STALE = -7.0
CENTRES = [-BIN_WIDTH * (place + 0.5) for place in range(NUM_BINS)]


class Inputs(NamedTuple):
    slots: torch.Tensor
    proposers: torch.Tensor
    own_scores: torch.Tensor
    num_merged: torch.Tensor
    offering: torch.Tensor
    knots: torch.Tensor
    is_drawn: torch.Tensor | None


def empty_scores(inputs: Inputs) -> torch.Tensor:
    like = inputs.own_scores[0]
    return torch.empty_strided(like.shape, like.stride(), device=like.device).fill_(
        STALE
    )


def random_inputs(
    num_proposers: int, size: int, device: torch.device, *, draws: bool = False
) -> Inputs:
    gen = torch.Generator().manual_seed(size)

    def randint(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=gen, dtype=torch.int32)

    everybody = (1 << num_proposers) - 1
    proposers = 1 + randint(everybody, MAX_NUM_REQS, size)
    scores = -14 * torch.rand(num_proposers, MAX_NUM_REQS, size, generator=gen)
    kind = torch.rand(scores.shape, generator=gen)
    for bound, odd in ((0.04, NAN), (0.08, -INF), (0.1, INF), (0.14, 0.0), (0.16, 2.0)):
        scores[(kind < bound) & (kind >= bound - 0.04)] = odd
    own = 1 << torch.arange(num_proposers)[:, None, None]
    scores[(proposers & own) == 0] = -INF
    num_merged = randint(size + 1, MAX_NUM_REQS)
    num_merged[5] = size
    knots = -12 * torch.rand(num_proposers * NUM_COMPANIES, NUM_BINS, generator=gen)
    inputs = Inputs(
        torch.tensor([5, 0, 3, 6]),
        proposers,
        scores,
        num_merged,
        1 + randint(everybody, MAX_NUM_REQS),
        knots.sort(1, descending=True).values,
        torch.tensor([True, False, True, False]) if draws else None,
    )
    return Inputs(*(None if each is None else each.to(device) for each in inputs))


def worth(score: float, knots: list[float]) -> float:
    value = np.interp(-score, [-each for each in CENTRES], knots)
    return float(value) + SLOPE * score + min(score - CENTRES[-1], 0.0)


def expected_score(inputs: Inputs, row: int, node: int) -> float:
    slot = int(inputs.slots[row])
    bits, offering = int(inputs.proposers[slot, node]), int(inputs.offering[slot])
    draws = inputs.is_drawn is not None and bool(inputs.is_drawn[row])
    if draws and bits & 1:
        return 0.0
    values = []
    for proposer, score in enumerate(inputs.own_scores[:, slot, node].tolist()):
        others = ~(1 << proposer)
        company = 2 if bits & others else 1 if offering & others else 0
        if math.isfinite(score):
            knots = inputs.knots[proposer * NUM_COMPANIES + company].tolist()
            values.append(worth(score, knots))
    return sum(values) / len(values) if values else -INF


def check(inputs: Inputs) -> None:
    copy = inputs._replace(own_scores=inputs.own_scores.clone())
    scores, expected = empty_scores(inputs), empty_scores(inputs)
    reference(*copy, expected)
    for row, slot in enumerate(inputs.slots.tolist()):
        num = int(inputs.num_merged[slot])
        by_hand = [expected_score(inputs, row, node) for node in range(num)]
        assert expected[slot, :num].tolist() == pytest.approx(by_hand, rel=1e-5)
    rate_candidates(*inputs, scores)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        inputs.own_scores, copy.own_scores, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("num_proposers", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 33, 200])
def test_matches_reference(
    size: int, num_proposers: int, draws: bool, device: torch.device
):
    check(random_inputs(num_proposers, size, device, draws=draws))


def test_matches_reference_at_full_size(device: torch.device):
    check(random_inputs(2, 512, device, draws=True))


def rate_one(
    own_scores: list[float],
    bits: int,
    device: torch.device,
    *,
    offering: int = 0b11,
    is_drawn: bool = False,
) -> float:
    """A node of two proposers. A row of knots is its number, counted down from -1."""
    knots = -1.0 - torch.arange(2 * NUM_COMPANIES, device=device)
    scores = torch.full((1, 1), STALE, device=device)
    rate_candidates(
        torch.tensor([0], device=device),
        torch.tensor([[bits]], dtype=torch.int32, device=device),
        torch.tensor(own_scores, device=device).view(2, 1, 1),
        torch.tensor([1], dtype=torch.int32, device=device),
        torch.tensor([offering], dtype=torch.int32, device=device),
        knots[:, None].repeat(1, NUM_BINS),
        torch.tensor([is_drawn], device=device),
        scores,
    )
    return float(scores[0, 0])


@pytest.mark.parametrize(
    ("own_scores", "bits", "offering", "expected"),
    [
        ([0.0, -INF], 0b01, 0b01, -1.0),  # alone
        ([0.0, -INF], 0b01, 0b11, -2.0),  # others offer, but not this
        ([-INF, 0.0], 0b10, 0b10, -4.0),
        ([-INF, 0.0], 0b10, 0b11, -5.0),
        ([0.0, 0.0], 0b11, 0b11, -4.5),  # the mean of both
        ([NAN, 0.0], 0b11, 0b11, -6.0),  # who has no number is company all the same
        ([-INF, INF], 0b11, 0b11, -INF),
    ],
)
def test_a_node_is_rated_in_its_company(
    own_scores: list[float],
    bits: int,
    offering: int,
    expected: float,
    device: torch.device,
):
    assert rate_one(own_scores, bits, device, offering=offering) == expected


def test_drawn_nodes_are_certain_and_others_beside_them_are_not(device: torch.device):
    assert rate_one([-3.0, 0.0], 0b11, device, is_drawn=True) == 0.0
    assert rate_one([-INF, -INF], 0b01, device, is_drawn=True) == 0.0
    assert rate_one([-INF, 0.0], 0b10, device, is_drawn=True) == -5.0


def test_values_fall_with_the_score_whatever_the_knots(device: torch.device):
    size = 2000
    knots = torch.full((NUM_COMPANIES, NUM_BINS), -1.0, device=device)
    knots[:, 20:] = -5.0
    scores = torch.full((1, size), STALE, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    own_scores = torch.linspace(0, -20, size, device=device).view(1, 1, size)
    bits = one.expand(1, size).contiguous()
    slots = torch.tensor([0], device=device)
    rate_candidates(slots, bits, own_scores, one * size, one, knots, None, scores)
    assert (scores.diff() < 0).all()


def test_other_slots_and_columns_past_the_nodes_are_left_alone(device: torch.device):
    inputs = random_inputs(2, 9, device, draws=True)
    inputs.num_merged[:] = 4
    before = inputs.own_scores.clone()
    scores = empty_scores(inputs)
    rate_candidates(*inputs, scores)
    assert (scores[[1, 2, 4]] == STALE).all() and (scores[:, 4:] == STALE).all()
    before[0, [5, 3], :4] = -INF
    torch.testing.assert_close(
        inputs.own_scores, before, rtol=0, atol=0, equal_nan=True
    )


def test_reads_and_writes_views_of_wider_buffers(device: torch.device):
    narrow = random_inputs(2, 37, device, draws=True)
    bits = torch.full((2 * MAX_NUM_REQS, 50), -1, device=device).int()[::2, 5:42]
    scores = torch.full((4, 2 * MAX_NUM_REQS, 50), NAN, device=device)[::2, ::2, 5:42]
    bits.copy_(narrow.proposers)
    scores.copy_(narrow.own_scores)
    check(narrow._replace(proposers=bits, own_scores=scores))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proposers": torch.zeros(7, 8).int()}, "one shape and one stride"),
        ({"knots": torch.zeros(5, 48)}, r"knots \(5, 48\), expected 3 rows of 48"),
        ({"knots": torch.zeros(48, 6).T}, "knots must be contiguous"),
        ({"is_drawn": torch.zeros(3).bool()}, "is_drawn is shorter than 4 requests"),
        ({"offering": torch.zeros(6).int()}, "must have 7 slots"),
    ],
)
def test_rejects_shapes_that_do_not_fit(
    changes: dict[str, torch.Tensor], message: str, device: torch.device
):
    inputs = random_inputs(2, 7, device, draws=True)
    changes = {name: tensor.to(device) for name, tensor in changes.items()}
    with pytest.raises(ValueError, match=message):
        rate_candidates(*inputs._replace(**changes), empty_scores(inputs))
