"""Kernels of one operation each, for the tests to run and to compare with NumPy."""

import triton
import triton.language as tl


@triton.jit
def unary(x_ptr, out_ptr, num, OP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, mask=at < num)
    tl.store(out_ptr + at, OP(x), mask=at < num)


@triton.jit
def binary(a_ptr, b_ptr, out_ptr, num, OP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a = tl.load(a_ptr + at, mask=at < num)
    b = tl.load(b_ptr + at, mask=at < num)
    tl.store(out_ptr + at, OP(a, b), mask=at < num)


@triton.jit
def along(x_ptr, out_ptr, rows, columns, OP: tl.constexpr, AXIS: tl.constexpr, OTHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A reduction of a matrix, masked elements being ``OTHER``."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * columns + column, mask=mask, other=OTHER)
    result = OP(x, AXIS)
    kept = tl.arange(0, COLUMNS if AXIS == 0 else ROWS)
    tl.store(out_ptr + kept, result, mask=kept < (columns if AXIS == 0 else rows))


@triton.jit
def scan(x_ptr, out_ptr, OP: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + at, OP(tl.load(x_ptr + at), AXIS, REVERSE))


@triton.jit
def dot(a_ptr, b_ptr, c_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    at = m[:, None] * N + n[None, :]
    start = tl.load(c_ptr + at)
    tl.store(out_ptr + at, tl.dot(a, b, start, out_dtype=TYPE))
