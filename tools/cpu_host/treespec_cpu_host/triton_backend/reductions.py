"""Reductions, scans and histograms. A reduction combines halves until one is left.

Halves rather than neighbours, so that every step is a loop of independent elements.
"""

from __future__ import annotations

from math import prod

from treespec_cpu_host.triton_backend.ir import Op
from treespec_cpu_host.triton_backend.kernel import Kernel, emits
from treespec_cpu_host.triton_backend.memory import condition
from treespec_cpu_host.triton_backend.scalars import c_type


def extents(op: Op) -> tuple[int, int, int]:
    """Elements before the axis, on it and behind it."""
    shape, axis = op.operands[0].type.shape, op.integer("axis")
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])


@emits("tt.reduce")
def reduce(kernel: Kernel, op: Op) -> None:
    outer, size, inner = extents(op)
    names = [kernel.filled(each) for each in op.operands]
    if size > 1:
        kernel.write(
            f"for (int o = 0; o < {outer}; o++)",
            f"for (int half = {size // 2 * inner}; half >= {inner}; half /= 2)",
            "for (int i = 0; i < half; i++) {",
            f"int at = o * {size * inner} + i;",
        )
        first = [f"{name}[at]" for name in names]
        second = [f"{name}[at + half]" for name in names]
        for name, text in zip(names, kernel.inline(op, first + second), strict=True):
            kernel.write(f"{name}[at] = {text};")
        kernel.write("}")
    for result, name in zip(op.results, names, strict=True):
        if not result.type.shape:
            kernel.place(result, f"{name}[0]")
        elif outer == 1 or size == 1:
            kernel.place(result, name)
        else:
            kernel.place(result, packed := kernel.declare(result.type))
            kernel.write(
                f"for (int o = 0; o < {outer}; o++)",
                f"for (int i = 0; i < {inner}; i++)",
                f"{packed}[o * {inner} + i] = {name}[o * {size * inner} + i];",
            )


@emits("tt.scan")
def scan(kernel: Kernel, op: Op) -> None:
    outer, size, inner = extents(op)
    backwards = "reverse = true" in op.text
    first, step = ((size - 1) * inner, f"- {inner}") if backwards else (0, f"+ {inner}")
    back = f"+ {inner}" if backwards else f"- {inner}"
    names = [kernel.filled(each) for each in op.operands]
    kernel.write(
        f"for (int o = 0; o < {outer}; o++) for (int i = 0; i < {inner}; i++)",
        f"for (int n = 1, at = o * {size * inner} + {first} {step} + i; n < {size}; n++, at = at {step}) {{",
    )
    before = [f"{name}[at {back}]" for name in names]
    here = [f"{name}[at]" for name in names]
    for name, text in zip(names, kernel.inline(op, before + here), strict=True):
        kernel.write(f"{name}[at] = {text};")
    kernel.write("}")
    for name, result in zip(names, op.results, strict=True):
        kernel.place(result, name)


@emits("tt.histogram")
def histogram(kernel: Kernel, op: Op) -> None:
    source, *mask = op.operands
    (result,) = op.results
    name = kernel.declare(result.type)
    kind = c_type(result.type.element)
    kernel.write(f"memset({name}, 0, {result.type.size} * sizeof({kind}));")
    with kernel.loop(source.type.shape) as loop:
        element = kernel.element(source, loop, loop.index)
        bin = f"(unsigned){element} % {result.type.size}"
        loop.statements.append(f"{condition(kernel, mask, loop)}{name}[{bin}]++;")
    kernel.place(result, name)
