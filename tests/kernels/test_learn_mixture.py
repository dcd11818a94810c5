"""kernels/learn_mixture.py against its reference."""

from typing import NamedTuple

import pytest
import torch

from vllm_treespec.kernels.learn_mixture import BLOCK_ROWS, learn_mixture
from vllm_treespec.kernels.mixing import (
    MAX_CHANGE,
    MEMORY,
    NUM_REMEMBERED,
    NUM_SUMS,
)
from vllm_treespec.kernels.reference.learn_mixture import learn_mixture as reference


class Inputs(NamedTuple):
    sums: torch.Tensor
    slopes: torch.Tensor
    offsets: torch.Tensor
    memory: torch.Tensor


def random_inputs(
    num_rows: int, num_voices: int, device: torch.device, known: float = 8.0
) -> Inputs:
    """Errors and bends that go with each other: those of one random child a row."""
    gen = torch.Generator().manual_seed(num_rows)
    odds, errors, bends = torch.randn(3, num_rows, num_voices, generator=gen)
    bends = bends.abs() / 4
    weighed = torch.stack([odds * odds * bends, odds * bends, bends], 2)
    counts = (known * torch.rand(bends.shape, generator=gen)).round()
    sums = torch.cat([torch.stack([counts, odds * errors, errors], 2), weighed], 2)
    memory = torch.cat([counts[:1, :, None], weighed[:1]], 2)[0]
    inputs = Inputs(
        sums,
        torch.rand(num_voices, generator=gen),
        torch.randn(num_voices, generator=gen),
        40 * memory,
    )
    return Inputs(*(each.contiguous().to(device) for each in inputs))


def learned(inputs: Inputs) -> Inputs:
    copy = Inputs(*(each.clone() for each in inputs))
    learn_mixture(*copy)
    return copy


def check(inputs: Inputs) -> None:
    found, expected = learned(inputs), Inputs(*(each.clone() for each in inputs))
    reference(*expected)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_voices", [3, 9])
@pytest.mark.parametrize("num_rows", [1, 2, 7, BLOCK_ROWS, BLOCK_ROWS + 1, 300])
def test_matches_reference(num_rows: int, num_voices: int, device: torch.device):
    check(random_inputs(num_rows, num_voices, device))


def test_what_is_remembered_fades(device: torch.device):
    inputs = random_inputs(5, 3, device, known=MEMORY)
    check(inputs)
    found = learned(inputs)
    assert (found.memory[:, 0] <= MEMORY).all() and (found.memory[:, 0] == MEMORY).any()


def test_slopes_stop_at_zero_and_steps_at_their_bound(device: torch.device):
    inputs = random_inputs(3, 3, device)
    inputs.sums.zero_()
    inputs.memory.zero_()
    inputs.sums[0, :, 1] = torch.tensor([900.0, -900.0, 0.0], device=device)
    inputs.sums[1, :, 2] = torch.tensor([0.0, 0.0, 900.0], device=device)
    inputs.slopes.copy_(torch.tensor([0.2, 0.2, 0.2]))
    check(inputs)
    found = learned(inputs)
    assert found.slopes.tolist() == pytest.approx([0.0, 0.2 + MAX_CHANGE, 0.2])
    assert found.offsets[2] == inputs.offsets[2] - MAX_CHANGE


def test_nothing_said_is_nothing_learned(device: torch.device):
    inputs = random_inputs(4, 3, device)
    inputs.sums.zero_()
    found = learned(inputs)
    assert torch.equal(found.slopes, inputs.slopes)
    assert torch.equal(found.offsets, inputs.offsets)


def test_reads_the_first_rows_of_a_longer_buffer(device: torch.device):
    inputs = random_inputs(9, 6, device)
    expected = learned(inputs._replace(sums=inputs.sums[:4].clone()))
    inputs.sums[4:] = float("nan")
    found = learned(inputs._replace(sums=inputs.sums[:4]))
    assert torch.equal(found.slopes, expected.slopes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sums": torch.zeros(4, 3, NUM_SUMS - 1)}, r"sums \(4, 3, 5\)"),
        ({"sums": torch.zeros(4, 3, 2 * NUM_SUMS)[:, :, ::2]}, "contiguous"),
        ({"slopes": torch.zeros(4)}, r"slopes \(4,\), expected contiguous \(3,\)"),
        ({"offsets": torch.zeros(4)}, r"offsets \(4,\)"),
        ({"memory": torch.zeros(3, NUM_REMEMBERED + 1)}, r"memory \(3, 5\)"),
    ],
)
def test_rejects_shapes_that_do_not_fit(
    changes: dict[str, torch.Tensor], message: str, device: torch.device
):
    inputs = random_inputs(4, 3, device)
    with pytest.raises(ValueError, match=message):
        learn_mixture(*inputs._replace(**changes))
