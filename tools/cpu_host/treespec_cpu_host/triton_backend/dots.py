"""Products of matrices: operands are widened to the type that sums are kept in."""

from __future__ import annotations

from math import prod

from treespec_cpu_host.triton_backend.ir import Op, Unknown, Value
from treespec_cpu_host.triton_backend.kernel import Kernel, emits
from treespec_cpu_host.triton_backend.scalars import SOFT

# Type of the result -> type of the sums
SUMS = {**dict.fromkeys(SOFT, "f32"), "f32": "f32", "f64": "f64", "i32": "i32"}


@emits("tt.dot")
def dot(kernel: Kernel, op: Op) -> None:
    left, right, start = op.operands
    (result,) = op.results
    *batch, rows, inner = left.type.shape
    columns = right.type.shape[-1]
    if start.type.element not in SUMS:
        raise Unknown(f"dots with sums of {start.type.element} are not known")
    kind = SUMS[start.type.element]
    a, b = (widened(kernel, each, kind) for each in (left, right))
    sums = kernel.filled(start, kind)
    sizes = (rows * columns, rows * inner, inner * columns)
    for number in range(prod(batch)):
        pairs = zip((sums, a, b), sizes, strict=True)
        arrays = ", ".join(f"{name} + {number * size}" for name, size in pairs)
        kernel.write(f"dot_{kind}({arrays}, {rows}, {columns}, {inner});")
    kernel.place(result, narrowed(kernel, sums, kind, result))


def widened(kernel: Kernel, value: Value, kind: str) -> str:
    return (
        kernel.name(value) if value.type.element == kind else kernel.filled(value, kind)
    )


def narrowed(kernel: Kernel, sums: str, kind: str, result: Value) -> str:
    if result.type.element == kind:
        return sums
    wide = Value(sums, result.type.of(kind))
    kernel.scopes[-1][wide] = sums
    return kernel.filled(wide, result.type.element)
