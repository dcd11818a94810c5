import math

import pytest
import torch

from vllm_treespec.kernels.perturb_logits import perturb_logits
from vllm_treespec.kernels.reference.perturb_logits import perturb_logits as twin


def inputs(
    num_reqs=3, num_rows=2, vocab_size=37, seed=0, drawn=True, dtype=torch.float32
):
    generator = torch.Generator().manual_seed(seed)
    return {
        "logits": torch.randn(num_reqs * num_rows, vocab_size, generator=generator).to(
            dtype
        ),
        "temperatures": torch.rand(num_reqs + 2, generator=generator) + 0.2,
        "seeds": torch.randint(-(2**62), 2**62, (num_reqs + 2,), generator=generator),
        "positions": torch.randint(
            0, 2**20, (num_reqs,), generator=generator, dtype=torch.int32
        ),
        "is_drawn": torch.full((num_reqs + 2,), drawn),
    }


def run(kernel, first_node=5, **given):
    noisy = torch.full(given["logits"].shape, torch.nan)
    kernel(**given, first_node=first_node, noisy=noisy)
    return noisy


@pytest.mark.parametrize(
    ("num_reqs", "num_rows", "vocab_size"), [(1, 1, 1), (3, 2, 37), (2, 5, 4100)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_and_twin_agree(num_reqs, num_rows, vocab_size, dtype):
    given = inputs(num_reqs, num_rows, vocab_size, dtype=dtype)
    given["is_drawn"][1:] = torch.arange(num_reqs + 1) % 2 == 0
    torch.testing.assert_close(
        run(perturb_logits, **given), run(twin, **given), rtol=1e-5, atol=1e-5
    )


def test_requests_that_do_not_draw_come_back_as_they_are():
    given = inputs(drawn=False)
    assert torch.equal(run(perturb_logits, **given), given["logits"])


def test_noise_depends_on_seed_position_node_and_token_alone():
    given = inputs(num_reqs=2, num_rows=1)
    for name in ("logits", "seeds", "temperatures", "positions"):
        given[name][:] = given[name][0].clone()
    noise = run(perturb_logits, **given)
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(run(perturb_logits, first_node=6, **given)[0], noise[0])
    for name in ("seeds", "positions"):
        other = {**given, name: given[name] + 1}
        assert not torch.equal(run(perturb_logits, **other)[0], noise[0])
    high = {**given, "seeds": given["seeds"] ^ (1 << 40)}
    assert not torch.equal(run(perturb_logits, **high)[0], noise[0])


def test_the_noise_is_gumbel_and_its_values_do_not_repeat():
    given = inputs(num_reqs=1, num_rows=1, vocab_size=200_000)
    given["logits"].zero_()
    noise = run(twin, **given).flatten().double()
    cumulative = torch.exp(-torch.exp(-noise)).sort().values
    steps = torch.arange(1, len(noise) + 1) / len(noise)
    # Kolmogorov-Smirnov, false alarm rate 1e-6
    assert (cumulative - steps).abs().max() < 2.7 / math.sqrt(len(noise))
    assert noise.unique().numel() > 0.98 * len(noise)


@pytest.mark.parametrize("num_children", [2, 3])
def test_the_best_are_draws_without_replacement(num_children):
    """Ordered outcomes against their exact probabilities, false alarm rate 1e-6."""
    probabilities = torch.tensor([0.45, 0.25, 0.2, 0.1])
    num_draws = 200_000
    given = {
        "logits": probabilities.log().repeat(num_draws, 1) * 0.7,
        "temperatures": torch.full((num_draws,), 0.7),
        "seeds": torch.full((num_draws,), 1234),
        "positions": torch.arange(num_draws, dtype=torch.int32),
        "is_drawn": torch.ones(num_draws, dtype=torch.bool),
    }
    drawn = run(twin, first_node=0, **given).topk(num_children, dim=1).indices
    found: dict[tuple[int, ...], int] = {}
    for outcome in drawn.tolist():
        found[tuple(outcome)] = found.get(tuple(outcome), 0) + 1
    statistic = 0.0
    for outcome, count in found.items():
        left, expected = 1.0, float(num_draws)
        for token in outcome:
            expected *= float(probabilities[token]) / left
            left -= float(probabilities[token])
        statistic += (count - expected) ** 2 / expected
    # chi-square quantiles at 1 - 1e-6, 11 and 23 degrees of freedom
    assert statistic < {2: 50.0, 3: 71.5}[num_children]
