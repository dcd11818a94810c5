"""kernels/rate_candidates.py against its reference and one node at a time."""

import math
from typing import NamedTuple

import pytest
import torch

from vllm_treespec.kernels.bins import NUM_COMPANIES
from vllm_treespec.kernels.mixing import MAX_LOG_ODDS
from vllm_treespec.kernels.rate_candidates import rate_candidates
from vllm_treespec.kernels.reference.rate_candidates import (
    rate_candidates as reference,
)
from vllm_treespec.testing.trees import chain_parents, random_parents

NAN, INF = float("nan"), float("inf")
MAX_NUM_REQS = 7
STALE = -7.0
POISON = 1 << 30  # a parent that nobody may follow


class Inputs(NamedTuple):
    slots: torch.Tensor
    parents: torch.Tensor
    proposers: torch.Tensor
    own_scores: torch.Tensor
    num_merged: torch.Tensor
    sibling_bits: torch.Tensor
    slopes: torch.Tensor
    offsets: torch.Tensor
    is_drawn: torch.Tensor | None


def empty_scores(inputs: Inputs) -> torch.Tensor:
    like = inputs.own_scores[0]
    return torch.empty_strided(like.shape, like.stride(), device=like.device).fill_(
        STALE
    )


def random_inputs(
    num_proposers: int,
    size: int,
    device: torch.device,
    *,
    draws: bool = False,
    chains: bool = False,
) -> Inputs:
    gen = torch.Generator().manual_seed(size)

    def randint(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=gen, dtype=torch.int32)

    everybody = (1 << num_proposers) - 1
    shape = (MAX_NUM_REQS, size)
    trees = (chain_parents if chains else random_parents)(MAX_NUM_REQS, size + 1)
    parents = (trees[:, 1:] - 1).contiguous()
    num_merged = randint(size + 1, MAX_NUM_REQS)
    num_merged[5] = size
    parents[torch.arange(size) >= num_merged[:, None]] = POISON
    proposers = 1 + randint(everybody, *shape)
    scores = -14 * torch.rand(num_proposers, *shape, generator=gen)
    kind = torch.rand(scores.shape, generator=gen)
    for bound, odd in ((0.02, NAN), (0.04, -INF), (0.05, INF), (0.1, 0.0), (0.12, 2.0)):
        scores[(kind < bound) & (kind >= bound - 0.02)] = odd
    own = 1 << torch.arange(num_proposers)[:, None, None]
    scores[(proposers & own) == 0] = -INF
    num_voices = num_proposers * NUM_COMPANIES
    inputs = Inputs(
        torch.tensor([5, 0, 3, 6]),
        parents,
        proposers,
        scores,
        num_merged,
        proposers | randint(everybody + 1, *shape),
        2 * torch.rand(num_voices, generator=gen),
        torch.randn(num_voices, generator=gen),
        torch.tensor([True, False, True, False]) if draws else None,
    )
    return Inputs(*(None if each is None else each.to(device) for each in inputs))


def log_odds(log_prob: float) -> float:
    misses = -math.expm1(min(log_prob, 0.0))
    odds = log_prob - math.log(misses) if misses > 0 else INF
    return min(max(odds, -MAX_LOG_ODDS), MAX_LOG_ODDS)


def log_sigmoid(odds: float) -> float:
    return min(odds, 0.0) - math.log1p(math.exp(-abs(odds)))


def expected_child(inputs: Inputs, row: int, node: int) -> float:
    """The log-probability of a node given its parent."""
    slot = int(inputs.slots[row])
    draws = inputs.is_drawn is not None and bool(inputs.is_drawn[row])
    bits, siblings = (
        int(each[slot, node]) for each in (inputs.proposers, inputs.sibling_bits)
    )
    parent, said = int(inputs.parents[slot, node]), []
    for proposer, scores in enumerate(inputs.own_scores[:, slot].tolist()):
        above = scores[parent] if parent >= 0 else 0.0
        edge = scores[node] - above
        if (draws and proposer == 0) or not math.isfinite(edge):
            continue
        others = ~(1 << proposer)
        company = 2 if bits & others else 1 if siblings & others else 0
        voice = proposer * NUM_COMPANIES + company
        slope, offset = float(inputs.slopes[voice]), float(inputs.offsets[voice])
        said.append(slope * log_odds(edge) + offset)
    return log_sigmoid(sum(said) / len(said)) if said else -INF


def expected_scores(inputs: Inputs, row: int) -> list[float]:
    slot = int(inputs.slots[row])
    paths: list[float] = []
    for node in range(int(inputs.num_merged[slot])):
        parent = int(inputs.parents[slot, node])
        above = paths[parent] if parent >= 0 else 0.0
        paths.append(above + expected_child(inputs, row, node))
    if inputs.is_drawn is not None and inputs.is_drawn[row]:
        bits = inputs.proposers[slot].tolist()
        return [0.0 if bits[node] & 1 else path for node, path in enumerate(paths)]
    return paths


def check(inputs: Inputs) -> None:
    copy = inputs._replace(own_scores=inputs.own_scores.clone())
    scores, expected = empty_scores(inputs), empty_scores(inputs)
    by_hand = [expected_scores(inputs, row) for row in range(len(inputs.slots))]
    reference(*copy, expected)
    for slot, values in zip(inputs.slots.tolist(), by_hand, strict=True):
        found = expected[slot, : len(values)].tolist()
        assert found == pytest.approx(values, rel=1e-4)
    rate_candidates(*inputs, scores)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
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


def test_chains_add_up_to_the_root(device: torch.device):
    inputs = random_inputs(2, 130, device, chains=True)
    inputs.proposers.fill_(3)
    inputs.own_scores.copy_(-0.1 * torch.arange(1, 131, device=device))
    check(inputs)
    scores = empty_scores(inputs)
    rate_candidates(*inputs, scores)
    assert scores[5].isfinite().all() and (scores[5].diff() < 0).all()


def rate_one(
    own_scores: list[float],
    bits: int,
    device: torch.device,
    *,
    siblings: int = 0b11,
    is_drawn: bool = False,
) -> float:
    """The odds of a node of two proposers. A voice says its number, from -1 down."""
    offsets = -1.0 - torch.arange(2 * NUM_COMPANIES, device=device)

    def one_node(value: int) -> torch.Tensor:
        return torch.tensor([[value]], dtype=torch.int32, device=device)

    scores = torch.full((1, 1), STALE, device=device)
    rate_candidates(
        torch.tensor([0], device=device),
        one_node(-1),
        one_node(bits),
        torch.tensor(own_scores, device=device).view(2, 1, 1),
        one_node(1)[0],
        one_node(siblings),
        torch.zeros_like(offsets),
        offsets,
        torch.tensor([is_drawn], device=device),
        scores,
    )
    score = float(scores)
    return score if score in (0.0, -INF) else log_odds(score)


@pytest.mark.parametrize(
    ("own_scores", "bits", "siblings", "expected"),
    [
        ([-1.0, -INF], 0b01, 0b01, -1.0),  # alone
        ([-1.0, -INF], 0b01, 0b11, -2.0),  # others propose siblings, but not this
        ([-INF, -1.0], 0b10, 0b10, -4.0),
        ([-INF, -1.0], 0b10, 0b11, -5.0),
        ([-1.0, 0.0], 0b11, 0b11, -4.5),  # the mean of both
        ([NAN, -1.0], 0b11, 0b11, -6.0),  # who has no number is company all the same
        ([-INF, 1.0], 0b11, 0b11, -6.0),  # above certainty is certain
        ([-INF, INF], 0b11, 0b11, -INF),
    ],
)
def test_a_node_is_rated_in_its_company(
    own_scores: list[float],
    bits: int,
    siblings: int,
    expected: float,
    device: torch.device,
):
    found = rate_one(own_scores, bits, device, siblings=siblings)
    assert found == pytest.approx(expected, abs=1e-4)


def test_drawn_nodes_are_certain_and_others_beside_them_are_not(device: torch.device):
    assert rate_one([-3.0, 0.0], 0b11, device, is_drawn=True) == 0.0
    assert rate_one([-INF, -INF], 0b01, device, is_drawn=True) == 0.0
    beside = rate_one([-INF, -1.0], 0b10, device, is_drawn=True)
    assert beside == pytest.approx(-5.0, abs=1e-4)


def rate_children(
    log_probs: torch.Tensor,  # [num_nodes] float32, children of the root
    slope: float,
    offset: float,
    device: torch.device,
) -> torch.Tensor:
    """Of one proposer, alone."""
    size = len(log_probs)
    one = torch.ones(1, size, dtype=torch.int32, device=device)
    scores = torch.full((1, size), STALE, device=device)
    rate_candidates(
        torch.tensor([0], device=device),
        -one,
        one,
        log_probs.to(device).view(1, 1, size),
        size * one[0, :1],
        one,
        torch.full((NUM_COMPANIES,), slope, device=device),
        torch.full((NUM_COMPANIES,), offset, device=device),
        None,
        scores,
    )
    return scores[0]


def test_a_voice_that_needs_no_correction_says_what_its_proposer_said(
    device: torch.device,
):
    log_probs = -torch.logspace(-5, 1, 500)
    found = rate_children(log_probs, 1.0, 0.0, device)
    torch.testing.assert_close(found.cpu(), log_probs, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("slope", "offset"), [(0.3, -2.0), (2.5, 3.0)])
def test_values_fall_with_the_score_whatever_the_correction(
    slope: float, offset: float, device: torch.device
):
    log_probs = torch.linspace(-0.01, -11.9, 2000)
    assert (rate_children(log_probs, slope, offset, device).diff() < 0).all()


def test_other_slots_and_columns_past_the_nodes_are_left_alone(device: torch.device):
    inputs = random_inputs(2, 9, device, draws=True)
    inputs.parents[:, :4] = torch.tensor([-1, 0, 1, 2], device=device)
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

    def widened(values: torch.Tensor) -> torch.Tensor:
        shape = (*(2 * size for size in values.shape[:-1]), 50)
        buffer = torch.full(shape, -1, dtype=values.dtype, device=device)
        view = buffer[tuple(slice(None, None, 2) for _ in shape[:-1])][..., 5:42]
        return view.copy_(values)

    names = ("parents", "proposers", "own_scores", "sibling_bits")
    check(narrow._replace(**{name: widened(getattr(narrow, name)) for name in names}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proposers": torch.zeros(7, 8).int()}, "one shape and one stride"),
        ({"sibling_bits": torch.zeros(6, 7).int()}, "one shape and one stride"),
        ({"slopes": torch.zeros(5)}, r"slopes \(5,\), expected 3 for each of 2"),
        ({"offsets": torch.zeros(12)[::2]}, "last dimension .* contiguous"),
        ({"is_drawn": torch.zeros(3).bool()}, "is_drawn is shorter than 4 requests"),
        ({"num_merged": torch.zeros(6).int()}, "must have 7 slots"),
    ],
)
def test_rejects_shapes_that_do_not_fit(
    changes: dict[str, torch.Tensor], message: str, device: torch.device
):
    inputs = random_inputs(2, 7, device, draws=True)
    # a move to the device keeps no stride
    changes = {
        name: each if each.device == device else each.to(device)
        for name, each in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        rate_candidates(*inputs._replace(**changes), empty_scores(inputs))
