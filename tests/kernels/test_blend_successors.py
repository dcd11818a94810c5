"""kernels/blend_successors.py against its reference."""

import pytest
import torch

from vllm_treespec.kernels.blend_successors import blend_successors
from vllm_treespec.kernels.recycling import NONE, RATE
from vllm_treespec.kernels.reference.blend_successors import (
    blend_successors as reference,
)
from vllm_treespec.kernels.reference.successors import rows_of
from vllm_treespec.testing.recycled import (
    VOCAB_SIZE,
    empty_table,
    random_contexts,
    random_successors,
)


def blend(kernel, table, before, token_ids, successors, weights, order, max_age):
    device = table.owners.device
    rows = rows_of(before, token_ids, VOCAB_SIZE, table.owners.shape[0])
    keys = ((rows << 32) | order).flatten().to(device)
    inputs = (each.to(device) for each in (before, token_ids, successors, weights))
    kernel(*keys.sort(), *inputs, VOCAB_SIZE, *table, max_age)


@pytest.mark.parametrize("num_contexts", [1, 2, 31, 70])
@pytest.mark.parametrize(("k", "num_new"), [(3, 1), (3, 3), (5, 7), (16, 16), (1, 4)])
def test_matches_reference_on_any_sequence(
    k: int, num_new: int, num_contexts: int, device: torch.device
):
    gen = torch.Generator().manual_seed(k + num_contexts)
    found, expected = empty_table(k, device), empty_table(k, device)
    for turn in range(6):
        # few tokens, so that contexts and rows come again
        contexts = random_contexts(num_contexts, gen, 7)
        learned = random_successors(num_contexts, num_new, gen)
        order = torch.randperm(2 * num_contexts, generator=gen)[:num_contexts]
        for kernel, table in ((blend_successors, found), (reference, expected)):
            blend(kernel, table, *contexts, *learned, order, 1 + turn % 4)
        assert torch.equal(found.owners, expected.owners)
        assert torch.equal(found.token_ids, expected.token_ids)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=0)
    assert int(found.owners[-1]) == NONE and (found.token_ids[-1] == NONE).all()
    assert (found.weights > 0).any()


def test_contexts_of_one_row_are_blended_in_their_order(device: torch.device):
    table, token = empty_table(3, device), torch.full((4,), 2)
    nobody_before = torch.full((4,), NONE)
    said = torch.tensor([[5], [6], [7], [8]], dtype=torch.int32)
    order = torch.tensor([3, 1, 9, 4])
    blend(
        blend_successors, table, nobody_before, token, said, torch.ones(4, 1), order, 3
    )
    assert table.token_ids[2].tolist() == [7, 8, 5]  # the oldest, 6, is too old
    assert table.weights[2].tolist() == pytest.approx(
        [RATE, RATE * (1 - RATE), RATE * (1 - RATE) ** 2]
    )


def test_of_equal_weights_the_newer_come_first(device: torch.device):
    table, one = empty_table(4, device), torch.tensor([1])
    said = torch.tensor([[9, 4, 6]], dtype=torch.int32)
    blend(
        blend_successors,
        table,
        torch.tensor([NONE]),
        one,
        said,
        torch.ones(1, 3),
        one,
        1,
    )
    assert table.token_ids[1].tolist() == [9, 4, 6, NONE]


def test_rejects_keys_that_do_not_fit(device: torch.device):
    table, ones = empty_table(3, device), torch.ones(1, 2, device=device)
    keys, token = torch.zeros(3).long().to(device), torch.zeros(1).long().to(device)
    with pytest.raises(ValueError, match="3 keys and 3 entries, expected 2"):
        blend_successors(keys, keys, token, token, ones.int(), ones, 9, *table, 1)
    with pytest.raises(ValueError, match="contiguous"):
        wide = torch.ones(1, 4, device=device).expand(2, 4)[:, ::2]
        keys = torch.zeros(4).long().to(device)
        blend_successors(keys, keys, token, token, wide.int(), wide, 9, *table, 1)
