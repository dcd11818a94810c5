"""kernels/tally_candidates.py against its reference and against paths and derivatives."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_treespec.kernels.bins import NUM_COMPANIES
from vllm_treespec.kernels.mixing import NUM_SUMS
from vllm_treespec.kernels.reference.tally_candidates import (
    tally_candidates as reference,
)
from vllm_treespec.kernels.reference.voices import listen
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
    sibling_bits: torch.Tensor
    slopes: torch.Tensor
    offsets: torch.Tensor
    token_ids: torch.Tensor
    num_tokens: torch.Tensor
    num_emitted: torch.Tensor


def int32(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def empty_sums(inputs: Inputs) -> torch.Tensor:
    shape = (len(inputs.slots), len(inputs.slopes), NUM_SUMS)
    return torch.full(shape, NAN, device=inputs.slots.device)


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
    for bound, odd in ((0.02, NAN), (0.04, -INF), (0.05, INF), (0.1, 0.0), (0.12, 2.0)):
        scores[(kind < bound) & (kind >= bound - 0.02)] = odd
    own = 1 << torch.arange(num_proposers)[:, None, None]
    scores[(proposers & own) == 0] = -INF
    num_voices = num_proposers * NUM_COMPANIES
    inputs = Inputs(
        torch.tensor([5, 0, 3, 6]),
        randint(2, *shape),
        parents,
        proposers,
        scores,
        num_merged,
        proposers | randint(everybody + 1, *shape),
        2 * torch.rand(num_voices, generator=gen),
        torch.randn(num_voices, generator=gen),
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
    paths: list[list[int]] = []
    for parent, token_id in zip(
        inputs.merged_parents[slot, :num].tolist(),
        inputs.merged_token_ids[slot, :num].tolist(),
        strict=True,
    ):
        paths.append([*(paths[parent] if parent >= 0 else []), token_id])
    return [
        int(path == said[: len(path)])
        if len(path) <= len(said) and path[:-1] == said[: len(path) - 1]
        else -1
        for path in paths
    ]


def expected_sums(inputs: Inputs, row: int) -> torch.Tensor:
    """Derivatives of the log-loss, each child's shared by those who speak of it."""
    slot, labels = int(inputs.slots[row]), expected_labels(inputs, row)
    num, sums = len(labels), torch.zeros(len(inputs.slopes), NUM_SUMS).double()
    said = listen(
        inputs.merged_parents[slot, None, :num],
        inputs.proposers[slot, None, :num],
        inputs.own_scores[:, slot, None, :num],
        inputs.sibling_bits[slot, None, :num],
    )
    for node, label in enumerate(labels):
        speakers = said.speaks[:, 0, node].nonzero()[:, 0].tolist()
        if label < 0 or not speakers:
            continue
        heard = [
            (int(said.voices[each, 0, node]), float(said.odds[each, 0, node]))
            for each in speakers
        ]
        mean = sum(
            float(inputs.slopes[voice]) * odds + float(inputs.offsets[voice])
            for voice, odds in heard
        ) / len(heard)
        odds = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
        loss = -torch.nn.functional.logsigmoid(odds if label else -odds)
        (slope,) = torch.autograd.grad(loss, odds, create_graph=True)
        (bend,) = torch.autograd.grad(slope, odds)
        error, bent = (float(each) / len(heard) for each in (slope.detach(), bend))
        for voice, odds in heard:
            sums[voice] += torch.tensor(
                [1, odds * error, error, odds * odds * bent, odds * bent, bent]
            )
    return sums.float()


def check(inputs: Inputs) -> None:
    found, expected = empty_sums(inputs), empty_sums(inputs)
    tally_candidates(*inputs, found)
    reference(*inputs, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for row, sums in enumerate(expected):
        by_hand = expected_sums(inputs, row)
        torch.testing.assert_close(sums.cpu(), by_hand, rtol=1e-4, atol=1e-4)


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
    known = sum(expected_sums(inputs, row)[:, 0] for row in range(4))
    assert (known > 0).all()


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
    """The labels of one proposer's tree, asked node by node: only the asked one has
    company. Past what was emitted the text holds the same tokens again."""
    size = len(parents)
    text = torch.tensor([[77, *emitted, *token_ids]], device=device)
    scores = -0.3 * torch.arange(1, size + 1, device=device).view(1, 1, size)
    corrections = torch.ones(2, NUM_COMPANIES, device=device)
    labels = []
    for node in range(size):
        bits = [3 if other == node else 1 for other in range(size)]
        sums = torch.full((1, NUM_COMPANIES, NUM_SUMS), NAN, device=device)
        tally_candidates(
            int32([0], device),
            int32([token_ids], device),
            int32([parents], device),
            int32([bits], device),
            scores,
            int32([size], device),
            int32([bits], device),
            *corrections,
            text,
            int32([1 + len(emitted)], device),
            int32([len(emitted)], device),
            sums,
        )
        known, _, error, *_ = sums[0, 2].tolist()
        labels.append(int(error < 0) if known else -1)
    return labels


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
        ([10, 30, 60, 9], [1, 0, 1, 0, -1, 1]),
        ([10, 30, 9], [1, 0, 1, 0, -1, 0]),
        ([20, 30], [0, 1, -1, -1, 1, -1]),
        # 60 may yet come
        ([10, 30], [1, 0, 1, 0, -1, -1]),
        # so may 30 and 40 after 10
        ([10], [1, 0, -1, -1, -1, -1]),
        # right at its depth, but the way there was wrong
        ([9, 30, 60], [0, 0, -1, -1, -1, -1]),
        ([], [-1, -1, -1, -1, -1, -1]),
    ],
)
def test_a_child_is_asked_about_where_the_path_to_it_was_right(
    emitted: list[int], labels: list[int], device: torch.device
):
    assert label_one(PARENTS, TOKEN_IDS, emitted, device) == labels


def test_a_chain_deeper_than_what_was_emitted_ends_unknown(device: torch.device):
    parents = chain_parents(1, 9)[0].tolist()
    tokens = list(range(50, 59))
    assert label_one(parents, tokens, [50, 51, 52], device) == [1] * 3 + [-1] * 6
    assert label_one(parents, tokens, [50, 99, 52], device) == [1, 0] + [-1] * 7


def test_two_siblings_of_one_token_are_both_right(device: torch.device):
    assert label_one([-1, -1, 1], [5, 5, 6], [5, 6], device) == [1, 1, 1]


def test_token_ids_are_compared_in_full(device: torch.device):
    # the last one would be 7 in 32 bits
    assert label_one([-1], [7], [7 + (1 << 32)], device) == [0]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_tree_teaches_what_its_paths_do(data: st.DataObject):
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
        one.expand(1, size).contiguous(),
        torch.tensor([0.7, 1.2, 1.1]),
        torch.tensor([0.3, -0.4, 0.2]),
        int32([[*emitted, *token_ids]], device),
        int32([len(emitted)], device),
        int32([len(emitted)], device),
    )
    check(Inputs(*(tensor.to(device) for tensor in inputs)))


def test_slots_do_not_mix_and_those_without_a_row_teach_nothing(device: torch.device):
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
        for _ in range(4)
    ]
    scores = torch.full((4, 2 * MAX_NUM_REQS, 50), NAN, device=device)
    tokens, parents, bits, siblings = (buffer[::2, 5:42] for buffer in buffers)
    text = torch.full((MAX_NUM_REQS, MAX_NUM_TOKENS + 9), 1, device=device).int()
    inputs = narrow._replace(
        merged_token_ids=tokens,
        merged_parents=parents,
        proposers=bits,
        own_scores=scores[::2, ::2, 5:42],
        sibling_bits=siblings,
        token_ids=text[:, :MAX_NUM_TOKENS],
    )
    for view, tensor in zip(inputs, narrow, strict=True):
        view.copy_(tensor.clone())
    check(inputs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("merged_parents", "one shape and one stride"),
        ("num_emitted", "num_emitted is shorter than 4 rows"),
        ("sibling_bits", "one shape and one stride"),
        ("num_merged", "num_merged must have 7 slots"),
        ("slopes", r"slopes \(5,\), expected contiguous \(6,\)"),
        ("num_tokens", "6 lengths of 7 texts"),
    ],
)
def test_rejects_shapes_that_do_not_fit(name: str, message: str, device: torch.device):
    inputs = random_inputs(2, 7, device)
    shorter = inputs._replace(**{name: getattr(inputs, name)[:-1]})
    with pytest.raises(ValueError, match=message):
        tally_candidates(*shorter, empty_sums(inputs))


def test_rejects_sums_of_other_companies(device: torch.device):
    inputs = random_inputs(2, 7, device)
    with pytest.raises(ValueError, match=r"sums \(4, 5, 6\)"):
        tally_candidates(*inputs, empty_sums(inputs)[:, :5])
