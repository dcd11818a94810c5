"""Loads, stores and atomic updates: one loop over the elements, masked ones skipped."""

from __future__ import annotations

from treespec_cpu_host.triton_backend.fusion import Loop
from treespec_cpu_host.triton_backend.ir import Op, Unknown, Value
from treespec_cpu_host.triton_backend.kernel import Kernel, emits
from treespec_cpu_host.triton_backend.scalars import BITS, SOFT, c_type, convert

# What is stored, from what is there (old) and the operand. In single precision for the
# short floats; {unsigned} compares without a sign.
UPDATES = {
    "add": "old + {0}",
    "fadd": "old + {0}",
    "and": "old & {0}",
    "or": "old | {0}",
    "xor": "old ^ {0}",
    "exch": "{0}",
    "max": "old > {0} ? old : {0}",
    "min": "old < {0} ? old : {0}",
    "umax": "(u{type})old > (u{type}){0} ? old : {0}",
    "umin": "(u{type})old < (u{type}){0} ? old : {0}",
}


@emits("tt.load")
def load(kernel: Kernel, op: Op) -> None:
    (result,) = op.results
    name = kernel.declare(result.type)
    with kernel.loop(result.type.shape) as loop:
        base, offset = kernel.address(op.operands[0], loop, loop.index)
        rest = [kernel.element(each, loop, loop.index) for each in op.operands[1:]]
        value = f"{base}[{offset}]"
        if rest:  # a mask, then what is there instead
            value = f"{rest[0]} ? {value} : {rest[1] if len(rest) > 1 else 0}"
        loop.statements.append(f"{kernel.at(name, loop)} = {value};")
    kernel.place(result, name)


@emits("tt.store")
def store(kernel: Kernel, op: Op) -> None:
    pointer, value, *mask = op.operands
    with kernel.loop(pointer.type.shape) as loop:
        base, offset = kernel.address(pointer, loop, loop.index)
        stored = kernel.element(value, loop, loop.index)
        loop.statements.append(f"{condition(kernel, mask, loop)}{base}[{offset}] = {stored};")  # fmt: skip


def condition(kernel: Kernel, mask: list[Value], loop: Loop) -> str:
    return f"if ({kernel.element(mask[0], loop, loop.index)}) " if mask else ""


@emits("tt.atomic_rmw")
def atomic_update(kernel: Kernel, op: Op) -> None:
    pointer, value, *mask = op.operands
    name = op.text.split(",")[0].strip()
    if name not in UPDATES:
        raise Unknown(f"the atomic update {name} is not known")
    atomic(kernel, op, UPDATES[name], pointer, [value], mask)


@emits("tt.atomic_cas")
def compare_and_swap(kernel: Kernel, op: Op) -> None:
    pointer, *values = op.operands
    atomic(kernel, op, "old == {0} ? {1} : old", pointer, values, [])


def atomic(
    kernel: Kernel,
    op: Op,
    update: str,
    pointer: Value,
    values: list[Value],
    mask: list[Value],
) -> None:
    (result,) = op.results
    element = result.type.element
    type, bits = c_type(element), BITS.get(element, c_type(element))
    name = kernel.declare(result.type)
    with kernel.loop(pointer.type.shape) as loop:
        base, offset = kernel.address(pointer, loop, loop.index)
        operands = [kernel.element(each, loop, loop.index) for each in values]
        if element in SOFT and "exch" not in op.text.split(",")[0]:
            old = convert("bits", element, "f32")
            operands = [convert(each, element, "f32") for each in operands]
            new = convert(update.format(*operands).replace("old", old), "f32", element)
            new = new.replace("bits", "old")
        else:
            new = update.format(*operands, type=type)
        text = f"ATOMIC({type}, {bits}, {base} + {offset}, {new})"
        for each in mask:
            text = f"{kernel.element(each, loop, loop.index)} ? {text} : 0"
        loop.statements.append(f"{kernel.at(name, loop)} = {text};")
    kernel.place(result, name)
