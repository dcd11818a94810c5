"""What a kernel tells people: asserts, prints; and hints that are for other compilers."""

from __future__ import annotations

import json
import re

from treespec_cpu_host.triton_backend.ir import Op, Unknown, Value
from treespec_cpu_host.triton_backend.kernel import Kernel, emits
from treespec_cpu_host.triton_backend.scalars import SOFT, convert


@emits("tt.assert")
def assert_(kernel: Kernel, op: Op) -> None:
    """The first program that fails ends, and so does the launch."""
    message = f"{kernel.source_line(op)}: {quoted(op)}"
    (holds,) = op.operands
    with kernel.loop(holds.type.shape) as loop:
        element = kernel.element(holds, loop, loop.index)
        loop.statements.append(f"if (!{element}) return {json.dumps(message)};")


@emits("tt.print")
def print_(kernel: Kernel, op: Op) -> None:
    """As on a GPU, a line for each element."""
    if "hex = true" in op.text:
        raise Unknown("prints in hexadecimal are not known")
    label = json.dumps(quoted(op).replace("%", "%%"))[1:-1]
    place = '"pid (%d, %d, %d) ", program_x, program_y, program_z'
    for value, signed in zip(op.operands, signs(op), strict=True):
        with kernel.loop(value.type.shape) as loop:
            text = printed(kernel.element(value, loop, loop.index), value, signed)
            number = f"(int)({loop.index.flat})"
            loop.statements.append(
                f'printf({place}); printf("idx (%d){label}", {number}); {text};'
            )
    if not op.operands:
        kernel.write(f'printf({place}); printf("{label}\\n");')
    kernel.write("fflush(stdout);")


def signs(op: Op) -> list[bool]:
    found = re.search(r"isSigned = array<i32: ([\d, ]+)>", op.text)
    return [each.strip() == "1" for each in found[1].split(",")] if found else []


def printed(element: str, value: Value, signed: bool) -> str:
    kind = value.type.element
    if kind.startswith("!"):
        return f'printf("%p\\n", (void *){element})'
    if kind in SOFT:
        element, kind = convert(element, kind, "f32"), "f32"
    if kind in ("f32", "f64"):
        return f'printf("%f\\n", (double){element})'
    # Integers of a tensor say themselves whether they have a sign.
    return f'printf("%{"lld" if signed else "llu"}\\n", (long long){element})'


def quoted(op: Op) -> str:
    """The string of an operation; MLIR escapes bytes as two hexadecimal digits."""
    found = re.search(r'"((?:[^"\\]|\\.)*)"', op.text)
    assert found, op.text
    escaped = re.sub(r"\\([0-9A-F]{2})", lambda b: chr(int(b[1], 16)), found[1])
    return escaped.replace("\\\\", "\\")


@emits("tt.assume", "llvm.intr.assume", "gpu.barrier", "ttg.barrier")
def hint(kernel: Kernel, op: Op) -> None:
    """A promise that is of no use, or a barrier: a program is one thread."""
