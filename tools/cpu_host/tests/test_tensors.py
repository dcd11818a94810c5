"""Everything that needs a whole tensor: memory, reductions, scans, dots, shapes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from host_kernels import along, dot, scan

ROWS, COLUMNS = 8, 32


@triton.jit
def total(x, AXIS: tl.constexpr):
    return tl.sum(x, AXIS)


@triton.jit
def highest(x, AXIS: tl.constexpr):
    return tl.max(x, AXIS)


@triton.jit
def lowest(x, AXIS: tl.constexpr):
    return tl.min(x, AXIS)


@triton.jit
def first_highest(x, AXIS: tl.constexpr):
    return tl.argmax(x, AXIS)


@triton.jit
def first_lowest(x, AXIS: tl.constexpr):
    return tl.argmin(x, AXIS)


@triton.jit
def odd(x, AXIS: tl.constexpr):
    return tl.xor_sum(x, AXIS)


REDUCTIONS = [
    (total, np.sum, 0), (highest, np.max, -1000), (lowest, np.min, 1000),
    (first_highest, np.argmax, -1000), (first_lowest, np.argmin, 1000),
    (odd, np.bitwise_xor.reduce, 0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64], ids=str)  # fmt: skip
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("op", "expected", "other"), REDUCTIONS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 27), (1, 1), (8, 32)])
def test_reductions(op, expected: Callable, other: int, axis: int, rows: int, columns: int, dtype: torch.dtype):  # fmt: skip
    if op is odd and dtype.is_floating_point:
        return
    # Values repeat, so that the first of several is what has to be found.
    gen = np.random.default_rng(rows)
    x = gen.integers(-9, 9, (rows, columns))
    given = torch.from_numpy(x).to(dtype)
    out = torch.full((max(rows, columns) + 1,), 555, dtype=dtype)
    along[(1,)](given, out, rows, columns, op, axis, other, ROWS, COLUMNS)
    wanted = expected(x, axis=axis)
    np.testing.assert_array_equal(out[: len(wanted)].numpy(), wanted)
    assert out[len(wanted)] == 555


@triton.jit
def rows_in_the_middle(x_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):  # fmt: skip
    a, b, c = tl.arange(0, A), tl.arange(0, B), tl.arange(0, C)
    x = tl.load(x_ptr + a[:, None, None] * B * C + b[None, :, None] * C + c[None, None, :])  # fmt: skip
    tl.store(out_ptr + a[:, None] * C + c[None, :], tl.sum(x, 1))


@pytest.mark.parametrize("shape", [(4, 8, 2), (2, 1, 16), (1, 16, 1), (8, 2, 4)])
def test_a_reduction_between_two_dimensions(shape: tuple[int, int, int]):
    x = torch.arange(np.prod(shape)).reshape(shape)
    out = torch.zeros(shape[0], shape[2], dtype=torch.int64)
    rows_in_the_middle[(1,)](x, out, *shape)
    assert torch.equal(out, x.sum(1))


@triton.jit
def running_total(x, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    return tl.cumsum(x, AXIS, REVERSE)


@triton.jit
def latest(a, b):
    return a * 2 + b


@triton.jit
def not_commutative(x, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    return tl.associative_scan(x, AXIS, latest, REVERSE)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", [running_total, not_commutative])
def test_scans(op, axis: int, reverse: bool):
    x = np.random.default_rng(0).integers(0, 9, (ROWS, COLUMNS))
    out = torch.zeros(ROWS, COLUMNS, dtype=torch.int64)
    scan[(1,)](torch.from_numpy(x), out, op, axis, reverse, ROWS, COLUMNS)
    line = np.moveaxis(x, axis, 0)
    line = line[::-1] if reverse else line
    factor = 2 if op is not_commutative else 1
    wanted = [line[0]]
    for each in line[1:]:
        wanted.append(wanted[-1] * factor + each)
    stacked = np.stack(wanted)[:: -1 if reverse else 1]
    np.testing.assert_array_equal(out.numpy(), np.moveaxis(stacked, 0, axis))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (2, 4, 8), (4, 32, 16), (16, 64, 32), (1, 16, 64), (8, 8, 1)])  # fmt: skip
@pytest.mark.parametrize(
    ("operands", "sums", "kind"),
    [(torch.float32, torch.float32, tl.float32), (torch.float64, torch.float64, tl.float64),
     (torch.int8, torch.int32, tl.int32), (torch.bfloat16, torch.float32, tl.float32),
     (torch.float16, torch.float16, tl.float16)],
)  # fmt: skip
def test_dots(operands, sums, kind, m: int, n: int, k: int):
    gen = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.randint(-9, 9, shape, generator=gen) for shape in ((m, k), (k, n), (m, n))
    )
    out = torch.zeros(m, n, dtype=sums)
    dot[(1,)](a.to(operands), b.to(operands), c.to(sums), out, m, n, k, kind)
    assert torch.equal(out.double(), (a @ b + c).to(sums).double())


@triton.jit
def batched_dot(a_ptr, b_ptr, out_ptr, B: tl.constexpr, N: tl.constexpr):
    b, m, n = tl.arange(0, B)[:, None, None], tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, None, :]  # fmt: skip
    at = b * N * N + m * N + n
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def test_a_batch_of_dots():
    a, b = torch.arange(3 * 256).reshape(3, 16, 16).remainder(7).float()[:2].contiguous(), torch.arange(512).reshape(2, 16, 16).remainder(5).float()  # fmt: skip
    out = torch.zeros(2, 16, 16)
    batched_dot[(1,)](a, b, out, 2, 16)
    assert torch.equal(out, a @ b)


@triton.jit
def reorder(x_ptr, numbers_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.trans(x))
    evens, odds = tl.split(tl.reshape(x, (N, N // 2, 2)))
    half = tl.arange(0, N)[:, None] * (N // 2) + tl.arange(0, N // 2)[None, :]
    tl.store(out_ptr + N * N + half, odds - evens * 2)
    tl.store(out_ptr + 2 * N * N + at, tl.reshape(tl.join(odds, evens), (N, N)))
    numbers = tl.load(numbers_ptr + at)
    tl.store(out_ptr + 3 * N * N + at, tl.gather(x, numbers, 1))
    flat = tl.load(x_ptr + tl.arange(0, N))
    counted = tl.histogram(tl.load(numbers_ptr + tl.arange(0, N)), N)
    tl.store(out_ptr + 4 * N * N + tl.arange(0, N), counted)
    both = tl.cat(flat, flat + 1)
    tl.store(out_ptr + 5 * N * N + tl.arange(0, 2 * N), both)
    tl.store(out_ptr + 6 * N * N + tl.arange(0, N), tl.sort(flat, descending=True))


def test_shapes():
    num = 16
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(0, 1000, (num, num), generator=gen)
    numbers = torch.randint(0, num, (num, num), generator=gen).int()
    out = torch.zeros(7, num * num, dtype=torch.int64)
    reorder[(1,)](x, numbers, out, num)
    evens, odds = x[:, ::2], x[:, 1::2]
    assert torch.equal(out[0].view(num, num), x.T)
    assert torch.equal(out[1, : num * num // 2].view(num, -1), odds - evens * 2)
    assert torch.equal(out[2].view(num, num), torch.stack([odds, evens], -1).flatten(1))
    assert torch.equal(out[3].view(num, num), x.gather(1, numbers.long()))
    assert torch.equal(out[4, :num], numbers[0].long().bincount(minlength=num))
    assert torch.equal(out[5, : 2 * num], torch.cat([x[0], x[0] + 1]))
    assert torch.equal(out[6, :num], x[0].sort(descending=True).values)


@triton.jit
def update(p_ptr, v_ptr, old_ptr, num, OP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    old = OP(p_ptr + at % 3, tl.load(v_ptr + at, mask=at < num), at < num)
    tl.store(old_ptr + at, old, mask=at < num)


@triton.jit
def atomic_add(p, v, mask):
    return tl.atomic_add(p, v, mask=mask)


@triton.jit
def atomic_max(p, v, mask):
    return tl.atomic_max(p, v, mask=mask)


@triton.jit
def atomic_min(p, v, mask):
    return tl.atomic_min(p, v, mask=mask)


@triton.jit
def atomic_or(p, v, mask):
    return tl.atomic_or(p, v, mask=mask)


@triton.jit
def atomic_and(p, v, mask):
    return tl.atomic_and(p, v, mask=mask)


@triton.jit
def atomic_xor(p, v, mask):
    return tl.atomic_xor(p, v, mask=mask)


@triton.jit
def exchange(p, v, mask):
    return tl.atomic_xchg(p, v, mask=mask)


UPDATES = [
    (atomic_add, lambda a, b: a + b), (atomic_max, max), (atomic_min, min),
    (atomic_or, lambda a, b: a | b), (atomic_and, lambda a, b: a & b),
    (atomic_xor, lambda a, b: a ^ b), (exchange, lambda a, b: b),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float16], ids=str)  # fmt: skip
@pytest.mark.parametrize(("op", "expected"), UPDATES)
def test_atomic_updates(op, expected: Callable, dtype: torch.dtype):
    if dtype.is_floating_point and op is not atomic_add:
        return
    values = [(7 * n) % 23 - 9 for n in range(37)]
    places, before = [5, -6, 12], []
    p = torch.tensor(places).to(dtype)
    old = torch.zeros(37, dtype=dtype)
    update[(3,)](p, torch.tensor(values).to(dtype), old, 37, op, 16)
    for n, value in enumerate(values):
        before.append(places[n % 3])
        places[n % 3] = expected(places[n % 3], value)
    assert (p.tolist(), old.tolist()) == (places, before)


@triton.jit
def lock(p_ptr, old_ptr, expected, new):
    tl.store(old_ptr + tl.program_id(0), tl.atomic_cas(p_ptr, expected, new))


def test_only_one_program_gets_a_lock():
    p, old = torch.tensor([4], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    lock[(3,)](p, old, 4, 9)
    assert (p.tolist(), old.tolist()) == ([9], [4, 9, 9])


@triton.jit
def masked(x_ptr, out_ptr, num, OTHER: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, mask=at < num, other=OTHER)
    tl.store(out_ptr + at, x, mask=at != 2)


def test_what_is_masked_is_neither_read_nor_written():
    # Reading past the end of the page would end the process.
    x, out = torch.arange(5), torch.full((8,), -1)
    masked[(1,)](x, out, 5, 77, 8)
    assert out.tolist() == [0, 1, -1, 3, 4, 77, 77, 77]
    masked[(1,)](torch.tensor([], dtype=torch.int64), out, 0, 3, 8)
    assert out.tolist() == [3, 3, -1, 3, 3, 3, 3, 3]


@triton.jit
def large(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.cumsum(x, 0) + tl.sum(x, 0))


def test_tensors_that_fit_no_stack():
    x = torch.randint(0, 9, (2, 1 << 20))
    out = torch.zeros_like(x)
    large[(2,)](x, out, 1 << 20)
    assert torch.equal(out, x.cumsum(1) + x.sum(1, keepdim=True))
