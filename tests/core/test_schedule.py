from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_treespec.core.schedule import (
    RequestLimits,
    drop_unwanted,
    nodes_by_batch_size,
)


@pytest.mark.parametrize(
    ("num_nodes", "max_rows", "max_num_reqs"),
    [(32, 256, 1024), (1, 2, 5), (64, 256, 3), (7, 8, 100), (33, 4096, 4096)],
)
def test_every_batch_size_has_a_budget_that_fits_and_no_larger_tier_would(
    num_nodes, max_rows, max_num_reqs
):
    ranges = nodes_by_batch_size(num_nodes, max_rows, max_num_reqs)
    budgets = {
        size: nodes for first, last, nodes in ranges for size in range(first, last + 1)
    }
    assert list(budgets) == list(range(1, max_num_reqs + 1))
    tiers = [
        num_nodes,
        *(2**power - 1 for power in range(12) if 2 << power <= num_nodes + 1),
    ]
    for size, nodes in budgets.items():
        assert nodes in tiers
        assert size * (nodes + 1) <= max_rows or nodes == 0
        larger = [each for each in tiers if nodes < each <= num_nodes]
        assert all(size * (each + 1) > max_rows for each in larger)
    assert len(ranges) <= num_nodes.bit_length() + 2


def test_the_documented_budgets():
    assert nodes_by_batch_size(31, 256, 1024) == [
        (1, 8, 31),
        (9, 16, 15),
        (17, 32, 7),
        (33, 64, 3),
        (65, 128, 1),
        (129, 1024, 0),
    ]


def test_a_request_gets_what_it_asked_for_and_a_reused_slot_starts_over():
    limits = RequestLimits(4, 2, torch.device("cpu"))
    limits.set(0, 8, [True, True])
    limits.set(1, 3, [False, True])
    limits.set(3, 0, [True, True])
    assert limits.max_nodes.tolist() == [8, 3, 0, 0]
    num_candidates = torch.full((2, 3), 7, dtype=torch.int32)
    drop_unwanted(num_candidates, limits.allowed[:, [3, 0, 1]])
    assert num_candidates.tolist() == [[0, 7, 0], [0, 7, 7]]
    assert limits.allowed[:, [3, 0, 1]].tolist() == [
        [False, True, False],
        [False, True, True],
    ]
    limits.set(3, 2, [True, False])
    assert limits.allowed[:, 3].tolist() == [True, False]
    assert limits.max_nodes.tolist() == [8, 3, 0, 2]
    assert np.array_equal(limits.max_nodes_np, [8, 3, 0, 2])
