"""kernels/weigh_successors.py against its reference."""

import pytest
import torch

from vllm_treespec.kernels.recycling import NONE
from vllm_treespec.kernels.reference.weigh_successors import (
    weigh_successors as reference,
)
from vllm_treespec.kernels.weigh_successors import weigh_successors
from vllm_treespec.testing.recycled import NUM_PAIRS, VOCAB_SIZE, random_contexts

NUM_ROWS = VOCAB_SIZE + NUM_PAIRS + 1


def weigh(kernel, contexts, best_ids, best_values, picks, device):
    num, width = best_ids.shape
    outs = (
        torch.empty(2 * num, dtype=torch.int64, device=device),
        torch.empty(num, width, dtype=torch.int32, device=device),
        torch.empty(num, width, device=device),
    )
    inputs = (each.to(device) for each in (*contexts, best_ids, best_values, picks))
    kernel(*inputs, VOCAB_SIZE, NUM_ROWS, *outs)
    return outs


def check(*inputs):
    found, expected = weigh(weigh_successors, *inputs), weigh(reference, *inputs)
    assert torch.equal(found[0], expected[0])
    # of broken logits nothing is learned, whatever is written
    sound = expected[2].isfinite().all(1)
    for each, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(each[sound], other[sound])
    return found


@pytest.mark.parametrize("num", [1, 5, 33])
@pytest.mark.parametrize("width", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_reference(
    width: int, num: int, dtype: torch.dtype, device: torch.device
):
    gen = torch.Generator().manual_seed(num)
    # rows of wider logits, some of them masked, some broken
    values = (4 * torch.randn(num, VOCAB_SIZE + 3, generator=gen)).to(dtype)[:, 2:-1]
    values[torch.rand(num, generator=gen) < 0.2, 2:] = -torch.inf
    for broken in (torch.nan, torch.inf):
        values[torch.rand(num, generator=gen) < 0.1, 3] = broken
    values[torch.rand(num, generator=gen) < 0.1] = -torch.inf
    best = values.topk(width)
    picks = torch.randint(VOCAB_SIZE + 2, (num,), generator=gen)
    picks[torch.rand(num, generator=gen) < 0.5] = NONE
    contexts = random_contexts(num, gen)
    check(contexts, best.indices, best.values, picks, device)


def test_what_was_accepted_counts_as_newer_than_guesses(device: torch.device):
    contexts = (torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]))
    best, picks = torch.tensor([[3], [4], [5]]), torch.tensor([NONE, 7, NONE])
    keys, successors, weights = check(contexts, best, torch.zeros(3, 1), picks, device)
    assert (keys >> 32)[:3].tolist() == [2, 2, 2]
    assert keys[:3].argsort().tolist() == keys[3:].argsort().tolist() == [0, 2, 1]
    assert successors.flatten().tolist() == [3, 7, 5]
    assert weights.flatten().tolist() == [1.0, 1.0, 1.0]


def test_tokens_of_no_vocabulary_teach_nothing(device: torch.device):
    said = torch.tensor([3, VOCAB_SIZE, -5])
    contexts = (torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]))
    keys, *_ = check(contexts, said[:, None], torch.zeros(3, 1), said, device)
    rows = (keys >> 32).view(2, 3)
    assert rows[0].tolist() == [2, NUM_ROWS - 1, NUM_ROWS - 1]
    assert rows[1, 1:].tolist() == [NUM_ROWS - 1, NUM_ROWS - 1]


def test_rejects_shapes_that_do_not_fit(device: torch.device):
    contexts = (torch.tensor([1]), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"must be \(1, 2\)"):
        values = torch.zeros(1, 3)
        weigh(
            weigh_successors, contexts, torch.ones(1, 2).long(), values, values, device
        )
