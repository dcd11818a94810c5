"""Loops, branches and what they carry.

What a loop carries has a variable or an array of its own, which the end of the body
sets, all at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from treespec_cpu_host.triton_backend.ir import Block, Op, Value
from treespec_cpu_host.triton_backend.kernel import Kernel, emits
from treespec_cpu_host.triton_backend.scalars import c_type, unsigned


@emits("scf.for")
def for_(kernel: Kernel, op: Op) -> None:
    low, high, step, *starts = op.operands
    (block,) = op.regions[0]
    induction, *carried = block.arguments
    names = begin(kernel, op.results, starts)
    element = induction.type.element
    kind = unsigned(element) if op.text.startswith(" unsigned") else c_type(element)
    first, end, by = (kernel.name(each) for each in (low, high, step))
    counter = kernel.new()
    kernel.write(
        f"for ({kind} {counter} = {first}; {counter} < ({kind}){end}; {counter} += {by}) {{"
    )
    inside = {induction: counter, **dict(zip(carried, names, strict=True))}
    region(kernel, op.regions[0], inside, names)
    kernel.write("}")


@emits("scf.while")
def while_(kernel: Kernel, op: Op) -> None:
    (before,), (after,) = op.regions
    names = begin(kernel, [Value("", each.type) for each in op.operands], op.operands)
    # What the condition hands on unchanged needs no copy.
    outputs = []
    for value, result in zip(before.ops[-1].operands[1:], op.results, strict=True):
        if value in before.arguments:
            outputs.append(names[before.arguments.index(value)])
        else:
            outputs.append(kernel.declare(result.type))
        kernel.place(result, outputs[-1])
    kernel.write("while (1) {")

    def test(last: Op) -> None:
        carry(kernel, last.operands[1:], outputs)
        kernel.write(f"if (!{kernel.name(last.operands[0])}) break;")

    with kernel.scope(dict(zip(before.arguments, names, strict=True))):
        kernel.region(op.regions[0], test)
    region(kernel, op.regions[1], dict(zip(after.arguments, outputs, strict=True)), names)  # fmt: skip
    kernel.write("}")


@emits("scf.if")
def if_(kernel: Kernel, op: Op) -> None:
    names = [kernel.place(each, kernel.declare(each.type)) for each in op.results]
    kernel.write(f"if ({kernel.name(op.operands[0])}) {{")
    for number, blocks in enumerate(op.regions):
        kernel.write("} else {" if number else "")
        region(kernel, blocks, {}, names)
    kernel.write("}")


def region(
    kernel: Kernel, blocks: list[Block], inside: dict[Value, str], names: list[str]
) -> None:
    """A region whose last operation yields what ``names`` are set to."""
    with kernel.scope(inside):
        kernel.region(blocks, lambda last: carry(kernel, last.operands, names))


def begin(
    kernel: Kernel, results: Sequence[Value], starts: Sequence[Value]
) -> list[str]:
    """Variables and arrays of ``results`` that hold ``starts`` at first."""
    names = []
    for result, start in zip(results, starts, strict=True):
        if start.type.shape:
            names.append(kernel.filled(start))
        else:
            names.append(kernel.declare(result.type))
            kernel.write(f"{names[-1]} = {kernel.name(start)};")
        kernel.place(result, names[-1])
    return names


def carry(kernel: Kernel, values: Sequence[Value], names: Sequence[str]) -> None:
    for value in values:
        kernel.name(value)  # before any of them changes
    kernel.write(*moves(kernel, values, names))


def moves(kernel: Kernel, values: Sequence[Value], names: Sequence[str]) -> list[str]:
    """Statements that set variables and arrays to values, all at once."""
    first, then = [], []
    for value, name in zip(values, names, strict=True):
        source = kernel.name(value)
        if source == name:
            continue
        if not value.type.shape:
            copy = kernel.new()
            first.append(f"{c_type(value.type.element)} {copy} = {source};")
            then.append(f"{name} = {copy};")
            continue
        if source in names:  # another move overwrites it
            copy = kernel.declare(value.type)
            first.append(kernel.copy(copy, source, value.type))
            source = copy
        then.append(kernel.copy(name, source, value.type))
    return first + then


@emits("cf.br")
def jump(kernel: Kernel, op: Op) -> None:
    kernel.write(target(kernel, op, 0))


@emits("cf.cond_br")
def branch(kernel: Kernel, op: Op) -> None:
    condition = kernel.name(op.operands[0])
    yes, no = target(kernel, op, 0), target(kernel, op, 1)
    kernel.write(f"if ({condition}) {yes} else {no}")


def target(kernel: Kernel, op: Op, number: int) -> str:
    label, values = op.targets[number]
    block = kernel.labels[label]
    names = [kernel.name(each) for each in block.arguments]
    return f"{{ {' '.join(moves(kernel, values, names))} goto {label}; }}"


@emits("tt.return")
def return_(kernel: Kernel, op: Op) -> None:
    kernel.write("return 0;")
