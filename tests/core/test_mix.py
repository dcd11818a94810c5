"""What a mixture learns from children whose fate is known."""

import pytest
import torch

from vllm_treespec.core.mix import FIRST_OFFSETS, FIRST_SLOPES, Mixture
from vllm_treespec.kernels.mixing import MAX_LOG_ODDS, MEMORY, NUM_REMEMBERED
from vllm_treespec.kernels.reference.learn_mixture import learn_mixture
from vllm_treespec.kernels.reference.tally_candidates import sum_voices
from vllm_treespec.kernels.reference.voices import Voices, log_odds, mix

CPU = torch.device("cpu")
NUM_CHILDREN = 64


def untaught(num_voices: int) -> Mixture:
    """Every voice is taken at its word."""
    return Mixture(
        torch.ones(num_voices),
        torch.zeros(num_voices),
        torch.zeros(num_voices, NUM_REMEMBERED),
    )


def by_voice(odds: torch.Tensor, speaks: torch.Tensor | None = None) -> Voices:
    """Of proposers that have one voice each, and speak unless told otherwise."""
    voices = torch.arange(len(odds))[:, None, None].expand(odds.shape)
    all_speak = torch.ones_like(odds, dtype=torch.bool)
    return Voices(odds, voices, all_speak if speaks is None else speaks)


def rates(mixture: Mixture, said: Voices) -> torch.Tensor:
    return mix(said, mixture.slopes, mixture.offsets).sigmoid()


def observe(mixture: Mixture, said: Voices, labels: torch.Tensor) -> None:
    sums = sum_voices(said, mixture.slopes, mixture.offsets, labels)
    learn_mixture(sums[None], mixture.slopes, mixture.offsets, mixture.memory)


def random_odds(num_voices: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_voices, 1, NUM_CHILDREN)
    return 6 * torch.rand(shape, generator=generator) - 4


def drawn(odds: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels of children that are right at these odds."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(odds.shape, generator=generator) < odds.sigmoid()).int()


def teach(mixture: Mixture, truth, num_voices: int, steps: int, first: int = 0) -> None:
    for seed in range(first, first + steps):
        odds = random_odds(num_voices, seed)
        observe(mixture, by_voice(odds), drawn(truth(odds), seed + 10**6))


def test_every_proposer_begins_alike():
    mixture = Mixture.allocate(2, CPU)
    assert mixture.slopes.tolist() == pytest.approx(2 * FIRST_SLOPES)
    assert mixture.offsets.tolist() == pytest.approx(2 * FIRST_OFFSETS)


def test_odds_of_any_log_probability_are_finite():
    scores = torch.tensor([0.0, -1e-9, -0.5, -30.0, -torch.inf])
    odds = log_odds(scores)
    assert odds[0] == MAX_LOG_ODDS and (odds[3:] == -MAX_LOG_ODDS).all()
    assert torch.allclose(odds[2].sigmoid().log(), scores[2])
    assert (odds.diff() <= 0).all()


def test_voices_that_agree_change_nothing_and_others_meet_halfway():
    odds = torch.tensor([-2.0, 1.0, 1.0])[:, None, None].expand(-1, 1, 3)
    speaks = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]]).bool().T[:, None]
    found = rates(untaught(3), by_voice(odds, speaks))[0]
    assert found[:2].tolist() == pytest.approx([0.7311, 0.3775], abs=1e-4)
    assert found[2].isnan()


def test_what_a_voice_gets_wrong_is_learned():
    mixture = untaught(1)
    teach(mixture, lambda odds: 0.5 * odds[0] - 1.0, 1, 60)
    odds = random_odds(1, 99)
    found = rates(mixture, by_voice(odds))
    assert torch.allclose(found, (0.5 * odds[0] - 1).sigmoid(), atol=0.04)


def test_a_few_steps_are_enough_to_tell_a_boaster():
    mixture = untaught(1)
    teach(mixture, lambda odds: torch.full_like(odds[0], -3.0), 1, 8)
    assert rates(mixture, by_voice(random_odds(1, 5))).mean() < 0.12


def test_two_voices_are_weighed_by_what_they_know():
    """The second knows nothing, the first a little more than it says."""
    mixture = untaught(2)
    teach(mixture, lambda odds: 1.5 * odds[0], 2, 200)
    odds = random_odds(2, 999)
    found = rates(mixture, by_voice(odds))
    assert torch.allclose(found, (1.5 * odds[0]).sigmoid(), atol=0.05)


def test_voices_that_are_silent_learn_nothing():
    mixture = untaught(2)
    speaks = torch.ones(2, 1, NUM_CHILDREN, dtype=torch.bool)
    speaks[1] = False
    for seed in range(20):
        observe(mixture, by_voice(random_odds(2, seed), speaks), torch.zeros(1, 64))
    odds = random_odds(2, 50)
    found = rates(mixture, by_voice(odds, ~speaks))
    assert torch.allclose(found, odds[1].sigmoid(), atol=1e-6)
    assert rates(mixture, by_voice(odds, speaks)).max() < 0.1


def test_unknown_children_teach_nothing():
    mixture, odds = untaught(1), random_odds(1, 0)
    observe(mixture, by_voice(odds), torch.full((1, NUM_CHILDREN), -1))
    assert torch.equal(rates(mixture, by_voice(odds)), odds[0].sigmoid())


def test_a_child_of_which_nobody_speaks_teaches_nothing():
    mixture, odds = untaught(2), random_odds(2, 0)
    nobody = torch.zeros_like(odds, dtype=torch.bool)
    observe(mixture, by_voice(odds, nobody), torch.zeros(1, NUM_CHILDREN))
    assert mixture.slopes.tolist() == [1, 1] and not mixture.offsets.any()


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_corrections_stay_finite_whatever_is_said(label: int, sign: float):
    """So sure, and always or never right: a bare Newton step would leap far away."""
    mixture = untaught(2)
    said = by_voice(torch.full((2, 1, NUM_CHILDREN), sign * MAX_LOG_ODDS))
    labels = torch.full((1, NUM_CHILDREN), label)
    for _ in range(200):
        observe(mixture, said, labels)
    assert torch.allclose(rates(mixture, said), labels.float(), atol=0.02)
    # And it is not a one-way street.
    for _ in range(400):
        observe(mixture, said, 1 - labels)
    assert torch.allclose(rates(mixture, said), 1 - labels.float(), atol=0.1)


def test_a_likelier_child_never_becomes_the_less_likely_one():
    mixture = untaught(1)
    teach(mixture, lambda odds: -odds[0], 1, 100)
    odds = torch.linspace(-9, 9, NUM_CHILDREN)[None, None]
    assert (rates(mixture, by_voice(odds)).diff() >= 0).all()


def test_the_past_fades():
    mixture = untaught(1)
    num_steps = int(8 * MEMORY / NUM_CHILDREN)
    teach(mixture, lambda odds: odds[0] - 3, 1, num_steps)
    teach(mixture, lambda odds: odds[0] + 1, 1, num_steps, first=num_steps)
    odds = random_odds(1, 7)
    found = rates(mixture, by_voice(odds))
    assert torch.allclose(found, (odds[0] + 1).sigmoid(), atol=0.06)
