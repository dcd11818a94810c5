"""kernels/residuals.py: picks at the edges, which no walk comes upon by chance."""

import pytest
import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.residuals import pick, softmax_terms


@triton.jit
def _pick_kernel(
    target_ptr, draft_ptr, beta, mass, numbers_ptr, out_ptr, vocab_size,
    REQS: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
):  # fmt: skip
    reqs = tl.arange(0, REQS)
    offsets = reqs.to(tl.int64) * 0
    ones = reqs.to(tl.float32) * 0 + 1
    wanted = reqs >= 0
    p_peak, p_scale = softmax_terms(
        target_ptr, offsets, ones, wanted, vocab_size, BLOCK_VOCAB
    )
    q_peak, q_scale = softmax_terms(
        draft_ptr, offsets, ones, wanted, vocab_size, BLOCK_VOCAB
    )
    token = pick(
        target_ptr, offsets, p_peak, p_scale, draft_ptr, offsets, q_peak, q_scale, ones,
        ones.to(tl.float64) * beta, ones.to(tl.float64) * mass,
        tl.load(numbers_ptr + reqs), wanted, wanted, vocab_size, BLOCK_VOCAB,
    )  # fmt: skip
    tl.store(out_ptr + reqs, token)


def pick_all(
    p: list[float], q: list[float], beta: float, mass: float, device: torch.device
) -> list[int]:
    """What the numbers 0, 1/64, ... and the largest one below 1 pick."""
    numbers = torch.arange(64, dtype=torch.float64, device=device) / 64
    numbers[-1] = 1 - 2.0**-53
    out = torch.empty(64, dtype=torch.int32, device=device)
    target, draft = torch.tensor([p, q], device=device).log().unbind()
    _pick_kernel[(1,)](
        target.contiguous(), draft.contiguous(), beta, mass, numbers, out, len(p),
        REQS=64, BLOCK_VOCAB=2,
    )  # fmt: skip
    return out.tolist()


def test_without_residual_mass_the_token_comes_from_the_target(device: torch.device):
    picked = pick_all([0.5, 0.0, 0.5], [0.5, 0.0, 0.5], 1.0, 0.0, device)
    assert picked == [0] * 32 + [2] * 32


@pytest.mark.parametrize("mass", [0.5, 0.6, 0.4])
def test_only_what_is_left_is_picked(mass: float, device: torch.device):
    """Also when the mass, summed in another order, is not quite that of the walk."""
    picked = pick_all(
        [0.0, 0.25, 0.25, 0.5, 0.0], [0.0, 0.5, 0.0, 0.25, 0.25], 1.0, mass, device
    )
    assert set(picked) == {2, 3}
    assert picked == sorted(picked)
