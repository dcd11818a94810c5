"""Random numbers in torch against Triton's, and against the published ones."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.reference import philox as twin
from vllm_treespec.kernels.residuals import uniform


@triton.jit
def _numbers_kernel(seeds_ptr, counters_ptr, words_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    seeds, counters = tl.load(seeds_ptr + places), tl.load(counters_ptr + places)
    words = tl.randint4x(seeds, counters)
    for word in tl.static_range(4):
        tl.store(words_ptr + word * BLOCK + places, words[word].to(tl.int64))


@triton.jit
def _uniform_kernel(seeds_ptr, positions_ptr, uses_ptr, out_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    seeds, positions = tl.load(seeds_ptr + places), tl.load(positions_ptr + places)
    tl.store(out_ptr + places, uniform(seeds, positions, tl.load(uses_ptr + places)))


def int64s(low: int, high: int, seed: int, device: torch.device) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (256,), generator=gen).to(device)


def test_words_are_tritons(device: torch.device):
    seeds = int64s(-(2**63), 2**63 - 1, 0, device)
    counters = int64s(0, 2**63 - 1, 1, device)
    words = torch.empty(4, 256, dtype=torch.int64, device=device)
    _numbers_kernel[(1,)](seeds, counters, words, BLOCK=256)
    expected = torch.stack(twin.philox(seeds, counters))
    torch.testing.assert_close(words & 0xFFFFFFFF, expected, rtol=0, atol=0)


def test_words_are_the_published_ones():
    # Random123's known answers for philox4x32-10
    zeros = torch.zeros(1, dtype=torch.int64)
    words = [f"{int(word):08x}" for word in twin.philox(zeros, zeros)]
    assert words == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_uniform_is_the_kernels(device: torch.device):
    seeds = int64s(-(2**63), 2**63 - 1, 2, device)
    positions = int64s(0, 2**31, 3, device)
    uses = int64s(0, 2**12, 4, device)
    out = torch.empty(256, dtype=torch.float64, device=device)
    _uniform_kernel[(1,)](seeds, positions, uses.int(), out, BLOCK=256)
    torch.testing.assert_close(
        out, twin.uniform(seeds, positions, uses), rtol=0, atol=0
    )
    assert out.min() >= 0 and out.max() < 1


def test_every_position_and_use_has_its_own_number():
    positions, uses = torch.meshgrid(
        torch.arange(500), torch.arange(200), indexing="ij"
    )
    numbers = twin.uniform(torch.full_like(uses, 5), positions, uses)
    assert numbers.unique().numel() == numbers.numel()
    # 53 bits are used, not 32: the low ones are not all zero
    assert ((numbers * 2**32) % 1 > 0).double().mean() > 0.99
    assert abs(float(numbers.mean()) - 0.5) < 0.005
