"""Every elementwise operation and conversion, on sizes that fill no vector."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from host_kernels import binary, unary

SIZE = 64
NUM = 3 * SIZE + 37
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64]


def run_unary(op: object, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # One element past the end shows stores that a mask should have kept away.
    out = torch.full((len(x) + 1,), 64, dtype=dtype)
    unary[(triton.cdiv(len(x), SIZE),)](x, out, len(x), op, SIZE)
    assert out[-1].float() == 64
    return out[:-1]


def run_binary(op: object, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype):
    out = torch.full((len(a) + 1,), 64, dtype=dtype)
    binary[(triton.cdiv(len(a), SIZE),)](a, b, out, len(a), op, SIZE)
    assert out[-1].float() == 64
    return out[:-1]


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def subtract(a, b):
    return a - b


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def divide(a, b):
    return a / b


@triton.jit
def whole_divide(a, b):
    return a // b


@triton.jit
def remainder(a, b):
    return a % b


@triton.jit
def both(a, b):
    return a & b


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def one_of(a, b):
    return a ^ b


@triton.jit
def left(a, b):
    return a << (b & 7)


@triton.jit
def right(a, b):
    return a >> (b & 7)


@triton.jit
def largest(a, b):
    return tl.maximum(a, b)


@triton.jit
def smallest(a, b):
    return tl.minimum(a, b)


@triton.jit
def choose(a, b):
    return tl.where(a < b, a, b * 2)


FLOAT_PAIRS = [
    (add, torch.add), (subtract, torch.sub), (multiply, torch.mul), (divide, torch.div),
    (remainder, torch.fmod), (largest, torch.maximum), (smallest, torch.minimum),
    (choose, lambda a, b: torch.where(a < b, a, b * 2)),
]  # fmt: skip
WHOLE_PAIRS = [
    (add, torch.add), (subtract, torch.sub), (multiply, torch.mul),
    (whole_divide, lambda a, b: torch.div(a, b, rounding_mode="trunc")),
    (remainder, torch.fmod), (both, torch.bitwise_and), (either, torch.bitwise_or),
    (one_of, torch.bitwise_xor), (left, lambda a, b: a << (b & 7)),
    (right, lambda a, b: a >> (b & 7)), (largest, torch.maximum),
    (smallest, torch.minimum), (choose, lambda a, b: torch.where(a < b, a, b * 2)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("op", "expected"), FLOAT_PAIRS)
def test_two_floats(op: object, expected: Callable, dtype: torch.dtype):
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(NUM, generator=gen).to(dtype) for _ in range(2))
    b[b == 0] = 1
    torch.testing.assert_close(run_binary(op, a, b, dtype), expected(a, b))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize(("op", "expected"), WHOLE_PAIRS)
def test_two_integers_wrap_around(op: object, expected: Callable, dtype: torch.dtype):
    gen = torch.Generator().manual_seed(0)
    ends = torch.iinfo(dtype)
    a, b = (
        torch.randint(ends.min, ends.max, (NUM,), dtype=dtype, generator=gen)
        for _ in range(2)
    )
    b[::5] = b[::5] % 7 + 1
    b[b == 0] = 3
    assert torch.equal(run_binary(op, a, b, dtype), expected(a, b))


def test_dividing_by_zero_and_by_minus_one_does_not_trap():
    a = torch.tensor([5, -(1 << 31), 7], dtype=torch.int32)
    b = torch.tensor([0, -1, -1], dtype=torch.int32)
    assert run_binary(whole_divide, a, b, torch.int32).tolist() == [0, -(1 << 31), -7]
    assert run_binary(remainder, a, b, torch.int32).tolist() == [0, 0, 0]


@triton.jit
def unsigned_divide(a, b):
    return a.to(tl.uint32, bitcast=True) // b.to(tl.uint32, bitcast=True)


@triton.jit
def unsigned_shift(a, b):
    return a.to(tl.uint32, bitcast=True) >> (b & 7).to(tl.uint32)


@triton.jit
def unsigned_less(a, b):
    return a.to(tl.uint32, bitcast=True) < b.to(tl.uint32, bitcast=True)


@triton.jit
def unsigned_largest(a, b):
    return tl.maximum(a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True))


@triton.jit
def unsigned_high(a, b):
    return tl.umulhi(a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (unsigned_divide, lambda a, b: a // b),
        (unsigned_shift, lambda a, b: a >> (b & 7)),
        (unsigned_less, lambda a, b: a < b),
        (unsigned_largest, np.maximum),
        (unsigned_high, lambda a, b: (a.astype(np.uint64) * b) >> np.uint64(32)),
    ],
)
def test_integers_without_a_sign(op: object, expected: Callable):
    gen = np.random.default_rng(0)
    a, b = gen.integers(1, 1 << 32, (2, NUM), dtype=np.uint32)
    given = (torch.from_numpy(each.view(np.int32)) for each in (a, b))
    result = run_binary(op, *given, torch.int32).numpy().view(np.uint32)
    np.testing.assert_array_equal(result, expected(a, b).astype(np.uint32))


@triton.jit
def less(a, b):
    return a < b


@triton.jit
def less_equal(a, b):
    return a <= b


@triton.jit
def greater(a, b):
    return a > b


@triton.jit
def greater_equal(a, b):
    return a >= b


@triton.jit
def equal(a, b):
    return a == b


@triton.jit
def different(a, b):
    return a != b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("op", "name"),
    [(less, "lt"), (less_equal, "le"), (greater, "gt"), (greater_equal, "ge"),
     (equal, "eq"), (different, "ne")],
)  # fmt: skip
def test_comparisons_hold_for_nothing_that_is_no_number(
    op: object, name: str, dtype: torch.dtype
):
    a = torch.arange(NUM).remainder(5).sub(2).to(dtype)
    b = torch.arange(NUM).remainder(3).sub(1).to(dtype)
    if dtype.is_floating_point:
        a[::7], b[::11] = float("nan"), float("nan")
    result = run_binary(op, a, b, torch.int8)
    assert torch.equal(result.bool(), getattr(torch, name)(a, b))


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def exp2(x):
    return tl.exp2(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def log2(x):
    return tl.log2(x)


@triton.jit
def sin(x):
    return tl.sin(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def floor(x):
    return tl.floor(x)


@triton.jit
def ceil(x):
    return tl.ceil(x)


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def negative(x):
    return -x


@triton.jit
def clamp(x):
    return tl.clamp(x, -1.0, 2.0)


@triton.jit
def multiply_add(x):
    return tl.fma(x, x, x)


MATHS = [
    (exp, torch.exp), (exp2, torch.exp2), (log, torch.log), (log2, torch.log2),
    (sin, torch.sin), (cos, torch.cos), (sqrt, torch.sqrt), (rsqrt, torch.rsqrt),
    (erf, torch.erf), (floor, torch.floor), (ceil, torch.ceil), (absolute, torch.abs),
    (negative, torch.neg), (clamp, lambda x: x.clamp(-1.0, 2.0)),
    (multiply_add, lambda x: x * x + x),
]  # fmt: skip
EDGES = [0.0, -0.0, 1.0, float("inf"), -float("inf"), 88.9, -104.5, 1e-40, 3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("op", "expected"), MATHS)
def test_functions_and_their_edges(op: object, expected: Callable, dtype: torch.dtype):
    x = torch.cat([torch.linspace(-20, 60, NUM), torch.tensor(EDGES)]).to(dtype)
    if op in (sin, cos, clamp):
        x = x[: NUM - 1]
    wanted = expected(x.double()).to(dtype)
    torch.testing.assert_close(
        run_unary(op, x, dtype), wanted, rtol=1e-6, atol=1e-44, equal_nan=True
    )


ALL = [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def same(x):
    return x


@pytest.mark.parametrize("target", ALL, ids=str)
@pytest.mark.parametrize("source", ALL, ids=str)
def test_floats_become_others_rounded_once(source: torch.dtype, target: torch.dtype):
    if source.itemsize == 1:
        x = torch.arange(256).to(torch.uint8).view(source)
    else:
        x = torch.randn(4000, generator=torch.Generator().manual_seed(1))
        x = (x * torch.logspace(-9, 2, 4000)).to(source)
    wanted = x.to(target)
    if (
        target.itemsize == 1 and source is not target
    ):  # the largest stands for what is too large
        largest = torch.finfo(target).max
        wanted = x.double().clamp(-largest, largest).to(source).to(target)
        if source is torch.float64:  # torch rounds it twice
            wanted = nearest(x, target)
    elif source is torch.float64 and target.itemsize == 2:
        wanted = nearest(x, target)
    result = run_unary(same, x, target)
    torch.testing.assert_close(
        result.double(), wanted.double(), rtol=0, atol=0, equal_nan=True
    )


def nearest(x: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Among a number's neighbours the closest, ties to the even one."""
    unsigned = torch.uint8 if target.itemsize == 1 else torch.int16
    near = x.float().clamp(-torch.finfo(target).max, torch.finfo(target).max).to(target)
    bits = near.view(unsigned).to(torch.int32)
    candidates = [near, *((bits + d).to(unsigned).view(target) for d in (-1, 1))]
    gaps = torch.stack([(each.double() - x.double()).abs() for each in candidates])
    odd = torch.stack([each.view(unsigned).to(torch.int32) & 1 for each in candidates])
    gaps = gaps.nan_to_num(float("inf"))
    best = (gaps * (1 + odd * 1e-15)).argmin(0)
    return torch.stack([e.double() for e in candidates]).gather(0, best[None])[0].to(target)  # fmt: skip


@pytest.mark.parametrize("target", [*INTEGERS, *FLOATS], ids=str)
@pytest.mark.parametrize("source", [*INTEGERS, *FLOATS], ids=str)
def test_numbers_become_others(source: torch.dtype, target: torch.dtype):
    x = torch.arange(NUM).sub(100).div(2).to(source)
    wanted = x.to(target)
    assert torch.equal(run_unary(same, x, target), wanted)


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32], ids=str)  # fmt: skip
def test_large_integers_are_rounded_once(target: torch.dtype):
    x = torch.tensor([2049, 2051, -4099, 65519, (1 << 24) + (1 << 16) + 1])
    if target is torch.float16:
        x = x[:-1]
    wanted = x.float() if target is torch.float32 else nearest(x.double(), target)
    assert torch.equal(run_unary(same, x, target).double(), wanted.double())


@triton.jit
def unsigned_to_float(x):
    return x.to(tl.uint32, bitcast=True).to(tl.float32)


@triton.jit
def float_to_unsigned(x):
    return x.to(tl.uint32)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def low_bit(x):
    return (x & 1).to(tl.int1)


@triton.jit
def minus_bool(x):
    return -((x > 0).to(tl.int32))


def test_other_conversions():
    x = torch.tensor([-1, 5, -(1 << 31)], dtype=torch.int32)
    wanted = [float((1 << 32) - 1), 5.0, float(1 << 31)]
    assert run_unary(unsigned_to_float, x, torch.float32).tolist() == pytest.approx(wanted)  # fmt: skip
    large = torch.tensor([3e9, 7.9])
    assert run_unary(float_to_unsigned, large, torch.int64).tolist() == [3000000000, 7]
    ones = torch.tensor([1.0, -2.5])
    assert torch.equal(run_unary(bits_of, ones, torch.int32), ones.view(torch.int32))
    assert run_unary(low_bit, x, torch.int8).tolist() == [1, 1, 0]
    assert run_unary(minus_bool, x, torch.int32).tolist() == [0, -1, 0]
