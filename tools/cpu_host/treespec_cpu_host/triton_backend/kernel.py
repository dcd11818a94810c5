"""A kernel's C: a function of one program, and a launcher that runs it over the grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from treespec_cpu_host.triton_backend.fusion import GATHERS, SHAPES, Tensors
from treespec_cpu_host.triton_backend.ir import (
    Block,
    Function,
    Op,
    Unknown,
    UnknownOperation,
    Value,
)
from treespec_cpu_host.triton_backend.scalars import c_type, is_elementwise

# What writes the C of an operation, by its name; the modules beside this one fill it.
HANDLERS: dict[str, Callable[[Kernel, Op], None]] = {}


def emits(
    *names: str,
) -> Callable[[Callable[[Kernel, Op], None]], Callable[[Kernel, Op], None]]:
    def register(handler: Callable[[Kernel, Op], None]) -> Callable[[Kernel, Op], None]:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Kernel(Tensors):
    """The statements of one program, written operation after operation."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.labels = {block.label: block for block in function.blocks}
        self.scopes += [{v: f"arg{n}" for n, v in enumerate(function.arguments)}, {}]
        blocks = function.blocks
        for value in [each for block in blocks[1:] for each in block.arguments]:
            self.scopes[-1][value] = self.declare(value.type)
        for block in blocks:
            if block is not blocks[0]:
                self.write(f"{block.label}:;")
            self.operations(block, self.op)

    def source_line(self, op: Op) -> str:
        return f"{self.function.name}, {self.function.source_line(op)}"

    def op(self, op: Op) -> None:
        try:
            if handler := HANDLERS.get(op.name):
                handler(self, op)
            elif is_elementwise(op) or op.name in (*SHAPES, *GATHERS, "tt.addptr"):
                self.elementwise(op)
            else:
                raise Unknown("the CPU backend does not know this operation")
        except Unknown as error:
            where = self.source_line(op)
            raise UnknownOperation(f"{where}: {op.name}: {error}") from None

    # Regions and blocks.

    @contextmanager
    def scope(self, names: dict[Value, str]) -> Iterator[None]:
        self.scopes.append(names)
        yield
        self.scopes.pop()

    def operations(self, block: Block, finish: Callable[[Op], None]) -> None:
        outer, self.block = self.block, block
        with self.scope({}):
            for op in block.ops[:-1]:
                self.op(op)
            finish(block.ops[-1])
        self.block = outer

    def region(self, blocks: list[Block], finish: Callable[[Op], None]) -> None:
        (block,) = blocks  # all that structured control flow has
        outer, self.pending = self.pending, set()
        with self.scope({}):
            self.operations(block, finish)
        self.pending = outer

    def inline(self, op: Op, arguments: list[str]) -> list[str]:
        """Statements of a region of scalars, and what it returns."""
        (block,) = op.regions[0]
        names = {}
        for value, argument in zip(block.arguments, arguments, strict=True):
            names[value] = self.new()
            kind = c_type(value.type.element)
            self.write(f"{kind} {names[value]} = {argument};")
        returned: list[str] = []
        with self.scope(names):
            self.operations(
                block, lambda last: returned.extend(map(self.name, last.operands))
            )
        return returned


@emits("tt.get_program_id")
def program_id(kernel: Kernel, op: Op) -> None:
    kernel.place(op.results[0], f"program_{op.text.split()[0]}")


@emits("tt.get_num_programs")
def num_programs(kernel: Kernel, op: Op) -> None:
    kernel.place(op.results[0], f"given->grid_{op.text.split()[0]}")


def source(function: Function) -> str:
    """The C of a kernel, whose ``launch`` takes its arguments as one struct."""
    kernel = Kernel(function)
    arguments = [each.type.element for each in function.arguments]
    fields = [f"  {passed(t)} arg{n};" for n, t in enumerate(arguments)]
    return "\n".join(
        [
            '#include "runtime.h"',
            "struct arguments {",
            "  int32_t grid_x, grid_y, grid_z;",
            *fields,
            "};",
            "static const char *program(const struct arguments *given, char *arena,",
            "    int32_t program_x, int32_t program_y, int32_t program_z) {",
            *[received(t, n) for n, t in enumerate(arguments)],
            *kernel.lines,
            "}",
            f"#define ARENA_BYTES {kernel.arena_bytes}",
            '#include "launch.h"\n',
        ]
    )


def passed(element: str) -> str:
    return "double" if element in ("f16", "bf16", "f32", "f64") else c_type(element)


def received(element: str, number: int) -> str:
    value = f"given->arg{number}"
    if element in ("f16", "bf16"):
        value = f"f32_to_{c_type(element)}((float){value})"
    return f"{c_type(element)} arg{number} = {value};"
