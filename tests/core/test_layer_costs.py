"""What skipping is worth, worked out by hand."""

import pytest

from vllm_treespec.config import SkipSet
from vllm_treespec.core.propose.layer_costs import LayerCosts, best_depth

COSTS = LayerCosts(attention=(1.0, 2.0, 3.0), mlp=(4.0, 5.0, 6.0), other=4.0)  # 25


def test_a_skipped_part_saves_its_own_time():
    assert COSTS.ratio(SkipSet()) == 1
    assert COSTS.ratio(SkipSet(attention=(2,), mlp=(0, 1))) == pytest.approx(13 / 25)


def test_the_best_depth_gains_most_tokens_per_time():
    # 1 + .9 over 1.5; 1 + .9 + .8 over 2; 2.7 + .1 over 2.5
    assert best_depth((0.9, 0.8, 0.1), 0.5) == (2, pytest.approx(2.7 / 2))


def test_a_draft_that_costs_as_much_as_the_target_gains_nothing():
    assert best_depth((1.0, 1.0, 1.0), 1.0)[1] == pytest.approx(1.0)
