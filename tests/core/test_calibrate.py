import pytest
import torch

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.propose.recycle import REFIT_EVERY, Rates
from vllm_treespec.kernels.recycling import BIN_WIDTH, MEMORY, NUM_BINS
from vllm_treespec.kernels.reference.successors import bin_centres, log_rates

CPU = torch.device("cpu")
KERNELS = choose_kernels(TreeSpecConfig(kernels="torch"), CPU)


class Calibration:
    """Candidates with scores, of which the rates usually see weights only. Two kinds are
    measured apart: here both see the same, unless two are given."""

    def __init__(self, num_kinds=1):
        self.num_kinds, self.rates = num_kinds, Rates(KERNELS, CPU)

    def observe(self, scores, labels):
        bins = (-scores / BIN_WIDTH).clamp(0, NUM_BINS - 1).long()
        for kind in range(2):
            bins_of, said = (each[kind % self.num_kinds] for each in (bins, labels))
            for counts, counted in (
                (self.rates.right, said == 1),
                (self.rates.known, said >= 0),
            ):
                counts[kind].index_add_(0, bins_of.flatten(), counted.float().flatten())
        self.rates.end_step()

    def apply(self, scores):
        kinds = [torch.full(scores.shape[1:-1], kind > 0) for kind in range(2)]
        return torch.stack(
            [
                log_rates(each, kinds[kind], self.rates.knots)
                for kind, each in enumerate(scores)
            ]
        )


def scores_between(low, high, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(1, 1, count, generator=generator)


def teach(calibration, rate_of, steps=40 * REFIT_EVERY, seed=0):
    """Candidates of all scores, right as often as ``rate_of`` their score says."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        scores = scores_between(-8, 0, 64, seed=step)
        right = torch.rand(scores.shape, generator=generator) < rate_of(scores)
        calibration.observe(scores, right.to(torch.int8))


def test_a_proposer_is_taken_at_its_word_at_first():
    scores = torch.tensor([[[-0.5, -1.0, -3.3, -7.0, -11.0]]])
    found = Calibration().apply(scores)
    assert torch.allclose(found, scores, atol=0.02)


@pytest.mark.parametrize(
    "rate_of", [lambda s: (0.5 * s).exp(), lambda s: (2 * s - 0.5).exp()]
)
def test_scores_become_measured_rates(rate_of):
    calibration = Calibration()
    teach(calibration, rate_of)
    scores = torch.tensor([[[-0.4, -1.0, -1.9, -2.5]]])
    found = calibration.apply(scores).exp()
    assert torch.allclose(found, rate_of(scores), atol=0.04)


def test_unknown_candidates_teach_nothing():
    calibration = Calibration()
    scores = scores_between(-8, 0, 64)
    for _ in range(3 * REFIT_EVERY):
        calibration.observe(scores, torch.full(scores.shape, -1, dtype=torch.int8))
    untaught = Calibration().apply(scores)
    assert torch.allclose(calibration.apply(scores), untaught, atol=1e-3)


def test_no_child_overtakes_its_parent_whatever_was_measured():
    calibration = Calibration()
    teach(calibration, lambda s: (s.sin().abs() + 0.1).clamp(max=1.0))
    scores = torch.linspace(0, -20, 4001)[None, None]
    values = calibration.apply(scores)
    assert (values.diff() < 0).all()


def test_the_fit_is_the_isotonic_regression():
    """Against pool-adjacent-violators, block by block."""
    calibration = Calibration()
    generator = torch.Generator().manual_seed(3)
    rates = calibration.rates
    rates.known += torch.randint(0, 200, (1, NUM_BINS), generator=generator)
    rates.right += rates.known * torch.rand(1, NUM_BINS, generator=generator)
    weights = (rates.known[0] + 16).tolist()
    sums = (rates.right[0] + 16 * bin_centres(CPU).exp()).tolist()
    blocks = []
    for weight, total in zip(weights, sums, strict=True):
        blocks.append([weight, total, 1])
        while len(blocks) > 1 and (
            blocks[-1][1] / blocks[-1][0] > blocks[-2][1] / blocks[-2][0]
        ):
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    expected = [total / weight for weight, total, size in blocks for _ in range(size)]
    KERNELS.fit_rates(rates.right, rates.known, rates.knots)
    assert torch.allclose(rates.knots.exp()[0], torch.tensor(expected), atol=1e-5)


def test_proposers_are_calibrated_one_by_one():
    calibration = Calibration(2)
    generator = torch.Generator().manual_seed(0)
    for step in range(20 * REFIT_EVERY):
        scores = scores_between(-6, 0, 32, seed=step).repeat(2, 1, 1)
        rates = torch.tensor([0.9, 0.1])[:, None, None]
        right = torch.rand(scores.shape, generator=generator) < rates
        calibration.observe(scores, right.to(torch.int8))
    modest, boastful = calibration.apply(torch.full((2, 1, 1), -2.0)).exp().flatten()
    assert modest > 0.8
    assert boastful < 0.15


def test_the_past_fades():
    calibration = Calibration()
    score = torch.full((1, 1, 512), -1.0)
    for label in (0, 1):
        labels = torch.full(score.shape, label, dtype=torch.int8)
        for _ in range(int(8 * MEMORY / 512)):
            calibration.observe(score, labels)
    assert calibration.apply(score[:, :, :1]).exp().item() > 0.95


def test_impossible_scores_stay_impossible():
    scores = torch.tensor([[[-torch.inf, 0.0, -1e30, -BIN_WIDTH]]])
    values = Calibration().apply(scores)
    assert values[0, 0, 0] == -torch.inf
    assert not values.isnan().any()
    assert values[0, 0, 2] < -1e29
