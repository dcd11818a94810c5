"""The threshold at which a draft stops follows what is accepted."""

import pytest
import torch

from vllm_treespec.core.propose.early_stop import HIGHEST, EarlyStop

CPU = torch.device("cpu")


def learn(stop, accepted, drafted, times=1):
    for _ in range(times):
        stop.learn(torch.tensor(accepted), torch.tensor(drafted))
    return float(stop.threshold)


def test_it_rises_while_deep_levels_are_rejected_and_falls_while_they_are_accepted():
    stop = EarlyStop(CPU)
    start = float(stop.threshold)
    high = learn(stop, [1, 0], [4, 4], times=50)
    assert high > start
    assert learn(stop, [4, 4], [4, 4], times=100) < high


def test_it_stays_within_bounds():
    stop = EarlyStop(CPU)
    assert learn(stop, [0], [5], times=2000) == pytest.approx(HIGHEST)
    assert learn(stop, [5], [5], times=5000) == 0.0


@pytest.mark.parametrize("drafted", [[0, 0], [1, 1]])
def test_steps_without_deeper_levels_teach_nothing(drafted):
    stop = EarlyStop(CPU)
    start = float(stop.threshold)
    assert learn(stop, [0, 0], drafted, times=5) == start


def test_levels_of_all_requests_count_alike():
    """Ten levels, nine accepted: above the wanted rate, although one tree failed."""
    stop = EarlyStop(CPU)
    start = float(stop.threshold)
    assert learn(stop, [10, 1], [10, 2], times=20) < start


def test_paths_that_others_continued_count_as_far_as_this_one_drafted():
    one, other = EarlyStop(CPU), EarlyStop(CPU)
    assert learn(one, [9], [3], times=5) == learn(other, [3], [3], times=5)
