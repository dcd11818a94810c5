"""Tensors as loops: which are arrays, and which are expressions computed where used.

A scalar is a C variable. A tensor is an array where something needs all of it (loads,
reductions, dots, what a loop carries). Every other tensor is an expression of one
element, and a run of such operations becomes one loop, which the C compiler vectorises.
An expression that is not cheap and is used more than once is kept in an array by the
first loop that computes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

from treespec_cpu_host.triton_backend.ir import Block, Op, Type, Value
from treespec_cpu_host.triton_backend.scalars import (
    EXPENSIVE,
    c_type,
    constant,
    convert,
    expression,
    num_bytes,
)

# Weight of expressions that are computed again rather than kept in an array.
CHEAP = 3
VECTOR = 8  # elements that are worth an inner loop of their own
STACK_BYTES = 16 << 10  # of an array; larger ones are in the program's arena
VIEWS = ("tt.expand_dims", "tt.reshape")  # the same elements in the same order
MOVES = (*VIEWS, "tt.broadcast", "tt.trans")  # elements of the operand, elsewhere
SHAPES = (*MOVES, "tt.splat", "tt.make_range", "arith.constant", "tt.unsplat")
GATHERS = ("tt.gather", "tt.join", "tt.cat", "tt.split")


class Index:
    """An element of a tensor: its number, or one number for each dimension."""

    def __init__(
        self, shape: tuple[int, ...], flat: str = "", parts: Sequence[str] = ()
    ) -> None:
        self.shape = shape
        self._flat, self._parts = flat, tuple(parts)

    @property
    def flat(self) -> str:
        if not self._flat:
            terms, stride = [], 1
            for size, part in zip(
                reversed(self.shape), reversed(self._parts), strict=True
            ):
                if part != "0":
                    terms.append(part if stride == 1 else f"{part} * {stride}")
                stride *= size
            joined = " + ".join(reversed(terms)) or "0"
            self._flat = f"({joined})" if len(terms) > 1 else joined
        return self._flat

    @property
    def parts(self) -> tuple[str, ...]:
        if not self._parts and self.shape:
            strides = itertools.accumulate(
                reversed(self.shape), lambda a, b: a * b, initial=1
            )
            sizes_strides = zip(reversed(self.shape), strides, strict=False)
            parts = [self._part(size, stride) for size, stride in sizes_strides]
            self._parts = tuple(reversed(parts))
        return self._parts

    def _part(self, size: int, stride: int) -> str:
        if size == 1 or self._flat == "0":
            return "0"
        part = self._flat if stride == 1 else f"({self._flat} / {stride})"
        outermost = stride * size == prod(self.shape)
        return part if outermost else f"({part} % {size})"


class Loop:
    """Statements that compute one element of everything that one loop is for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.statements: list[str] = []
        # What is computed already: value and element -> its C
        self.known: dict[tuple[Value, str], str] = {}
        long = [n for n, size in enumerate(shape) if size > 1]
        if len(long) < 2 or (len(long) < 4 and shape[-1] >= VECTOR):
            parts = [f"i{n}" if n in long else "0" for n in range(len(shape))]
            self.index = Index(shape, parts=parts)
            self.heads = [
                f"for (int i{n} = 0; i{n} < {shape[n]}; i{n}++)" for n in long
            ]
        else:  # as sorting has it: many dimensions of 2
            self.index = Index(shape, flat="i")
            self.heads = [f"for (unsigned i = 0; i < {prod(shape)}; i++)"]

    def covers(self, shape: tuple[int, ...], index: Index) -> bool:
        return prod(shape) == prod(self.shape) and index.flat == self.index.flat

    def text(self) -> list[str]:
        if not self.heads:
            return self.statements
        return [" ".join([*self.heads, "{"]), *self.statements, "}"]


class Tensors:
    """Names, arrays and expressions of a kernel's values, and the C written so far."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.arena_bytes = 0
        self.numbers = itertools.count()
        # name of the variable or array of each value that has one, innermost last
        self.scopes: list[dict[Value, str]] = []
        # used more than once and not cheap: kept when a loop first computes them
        self.pending: set[Value] = set()
        self.weights: dict[Value, int] = {}
        self.block: Block | None = None

    # Names.

    def new(self, prefix: str = "v") -> str:
        return f"{prefix}{next(self.numbers)}"

    def write(self, *lines: str) -> None:
        self.lines += lines

    def placed(self, value: Value) -> str | None:
        for scope in reversed(self.scopes):
            if value in scope:
                return scope[value]
        return None

    def place(self, value: Value, name: str) -> str:
        """For the region if its own block computes it, else for this block alone."""
        here = value.op is None or value.op.block is self.block
        self.scopes[-2 if here else -1][value] = name
        return name

    def name(self, value: Value) -> str:
        """The variable of a scalar, the array of a tensor."""
        if found := self.placed(value):
            return found
        op = value.op
        assert op and value.type.shape, f"arguments and scalars have names: {value}"
        viewed = op.name in VIEWS and value not in self.pending
        if viewed and self.is_whole(op.operands[0]):
            return self.place(value, self.name(op.operands[0]))
        return self.materialise(value)

    def is_whole(self, value: Value) -> bool:
        """Whether a view of it may as well be the array itself."""
        if self.placed(value):
            return True
        op = value.op
        return bool(op and op.name in VIEWS and self.is_whole(op.operands[0]))

    def declare(self, type: Type) -> str:
        """A new variable or array."""
        name = self.new()
        if type.shape:
            self.array(type.element, name, type.size)
        else:
            self.write(f"{c_type(type.element)} {name};")
        return name

    def array(self, element: str, name: str, size: int) -> None:
        """On the stack, or in what the program's thread has allocated for it."""
        kind, total = c_type(element), size * num_bytes(element)
        if total <= STACK_BYTES:
            self.write(f"ALIGNED {kind} {name}[{size}];")
            return
        at = f"arena + {self.arena_bytes}"
        self.write(f"{kind} *restrict {name} = __builtin_assume_aligned({at}, 64);")
        self.arena_bytes += -(-total // 64) * 64

    def copy(self, target: str, source: str, type: Type) -> str:
        return f"memcpy({target}, {source}, {type.size * num_bytes(type.element)});"

    # Loops.

    @contextmanager
    def loop(self, shape: tuple[int, ...]) -> Iterator[Loop]:
        loop = Loop(shape)
        yield loop
        self.keep_pending(loop)
        self.write(*loop.text())

    def keep_pending(self, loop: Loop) -> None:
        at = loop.index.flat
        # In the order of computation: the same kernel is the same C every time.
        built = dict.fromkeys(value for value, flat in loop.known if flat == at)
        for value in [each for each in built if each in self.pending]:
            self.pending.discard(value)
            if all(built.keys() & set(user.results) for user in value.users):
                continue  # nothing else wants it
            name = self.declare(value.type)
            loop.statements.append(f"{name}[{at}] = {loop.known[value, at]};")
            self.place(value, name)

    def materialise(self, value: Value) -> str:
        self.pending.discard(value)
        return self.place(value, self.filled(value))

    def filled(self, value: Value, element: str = "") -> str:
        """A new array of what ``value`` holds, converted to the float ``element``."""
        element = element or value.type.element
        name = self.declare(value.type.of(element))
        with self.loop(value.type.shape) as loop:
            text = self.element(value, loop, loop.index)
            text = convert(text, value.type.element, element)
            loop.statements.append(f"{self.at(name, loop)} = {text};")
        return name

    @staticmethod
    def at(name: str, loop: Loop) -> str:
        return f"{name}[{loop.index.flat}]" if loop.shape else name

    # Elements.

    def element(self, value: Value, loop: Loop, index: Index) -> str:
        if name := self.placed(value):
            return f"{name}[{index.flat}]" if value.type.shape else name
        if known := loop.known.get((value, index.flat)):
            return known
        if value in self.pending and not loop.covers(value.type.shape, index):
            return f"{self.materialise(value)}[{index.flat}]"
        op = value.op
        assert op, "arguments have names"
        computed = self.compute(op, value, loop, index)
        if op.name not in ("tt.splat", "arith.constant", *VIEWS):
            name = self.new("t")
            kind = c_type(value.type.element)
            loop.statements.append(f"{kind} {name} = {computed};")
            computed = name
        loop.known[value, index.flat] = computed
        return computed

    def compute(self, op: Op, value: Value, loop: Loop, index: Index) -> str:
        if op.name == "arith.constant":
            return constant(op)
        if op.name == "tt.make_range":
            return sum_of(index.flat, op.integer("start"))
        source = op.operands[0]
        if op.name == "tt.splat":
            return self.name(source)
        if op.name == "tt.unsplat":
            return f"{self.name(source)}[0]"
        if op.name == "tt.addptr":
            return "({} + {})".format(*self.address(value, loop, index))
        if op.name in MOVES:
            return self.element(source, loop, moved(op, index))
        if op.name in GATHERS:
            return getattr(self, op.name.removeprefix("tt."))(op, value, loop, index)
        return expression(op, [self.element(each, loop, index) for each in op.operands])

    def gather(self, op: Op, value: Value, loop: Loop, index: Index) -> str:
        source, numbers = op.operands
        axis, shape = op.integer("axis"), source.type.shape
        number = self.element(numbers, loop, index)
        parts = list(index.parts)
        # Out of range is undefined; here it must not leave the array.
        parts[axis] = f"((unsigned){number} % {shape[axis]})"
        return f"{self.name(source)}[{Index(shape, parts=parts).flat}]"

    def join(self, op: Op, value: Value, loop: Loop, index: Index) -> str:
        shape = op.operands[0].type.shape
        at = Index(shape, parts=index.parts[:-1]) if shape else index
        first, second = (self.element(each, loop, at) for each in op.operands)
        return f"({index.parts[-1]} ? {second} : {first})"

    def split(self, op: Op, value: Value, loop: Loop, index: Index) -> str:
        half = str(op.results.index(value))
        source = op.operands[0]
        at = Index(source.type.shape, parts=[*index.parts, half])
        return self.element(source, loop, at)

    def cat(self, op: Op, value: Value, loop: Loop, index: Index) -> str:
        first, second = (self.name(each) for each in op.operands)
        size, flat = op.operands[0].type.size, index.flat
        return f"({flat} < {size} ? {first}[{flat}] : {second}[{flat} - {size}])"

    def address(self, value: Value, loop: Loop, index: Index) -> tuple[str, str]:
        """A pointer and an offset, which loops over neighbours show to be such."""
        op = value.op
        if self.placed(value) or not op or value in self.pending:
            return self.element(value, loop, index), "0"
        if op.name == "tt.addptr":
            base, offset = self.address(op.operands[0], loop, index)
            more = self.offset(op.operands[1], loop, index)
            return base, more if offset == "0" else f"({offset} + {more})"
        if op.name == "tt.splat":
            return self.name(op.operands[0]), "0"
        if op.name in MOVES:
            return self.address(op.operands[0], loop, moved(op, index))
        return self.element(value, loop, index), "0"

    def offset(self, value: Value, loop: Loop, index: Index) -> str:
        """An integer in 64 bits: as 32 could wrap, loops over them do not vectorise."""
        op = value.op
        if not self.placed(value) and op and value not in self.pending:
            if sign := {"addi": "+", "subi": "-", "muli": "*"}.get(op.name[6:]):
                a, b = (self.offset(each, loop, index) for each in op.operands)
                return f"({a} {sign} {b})"
            if op.name == "arith.extsi" and op.operands[0].type.element != "i1":
                return self.offset(op.operands[0], loop, index)
            if op.name in MOVES:
                return self.offset(op.operands[0], loop, moved(op, index))
        return f"(int64_t){self.element(value, loop, index)}"

    # Elementwise operations.

    def elementwise(self, op: Op) -> None:
        for result in op.results:
            c_type(result.type.element)  # or an error that names it
            if result.type.shape:
                self.postpone(op, result)
            elif op.name == "arith.constant":
                self.place(result, constant(op))
            else:
                self.place(result, self.scalar(op, result))

    def scalar(self, op: Op, result: Value) -> str:
        loop = Loop(())
        text = self.compute(op, result, loop, loop.index)
        self.write(*loop.statements)
        name = self.new()
        self.write(f"{c_type(result.type.element)} {name} = {text};")
        return name

    def postpone(self, op: Op, result: Value) -> None:
        self.weights[result] = weight = self.weight(op)
        operand_weight = self.weights.get(op.operands[0], 0) if op.operands else 0
        if op.name == "tt.broadcast" and operand_weight > CHEAP:
            self.name(op.operands[0])
        if weight > CHEAP and not result.type.element.startswith("!"):
            if any(user.block is not op.block for user in result.users):
                self.materialise(result)
            elif len(result.users) > 1:
                self.pending.add(result)

    def weight(self, op: Op) -> int:
        """What it costs to compute an element, with what is not kept in arrays."""
        own = 8 if op.name in EXPENSIVE else 0 if op.name in SHAPES else 1
        computed = [
            v for v in op.operands if v not in self.pending and not self.placed(v)
        ]
        return own + sum(self.weights.get(each, 0) for each in computed)


def sum_of(text: str, number: int) -> str:
    return f"({text} + {number})" if number else text


def moved(op: Op, index: Index) -> Index:
    """Where an element of the result of one of ``MOVES`` is in the operand."""
    shape = op.operands[0].type.shape
    if op.name == "tt.reshape":
        return Index(shape, index.flat)
    if op.name == "tt.expand_dims":
        axis = op.integer("axis")
        return Index(shape, index.flat, index.parts[:axis] + index.parts[axis + 1 :])
    if op.name == "tt.broadcast":
        pairs = zip(shape, index.parts, strict=True)
        return Index(shape, parts=["0" if size == 1 else part for size, part in pairs])
    parts = [""] * len(shape)
    for axis, part in zip(op.integers("order"), index.parts, strict=True):
        parts[axis] = part
    return Index(shape, parts=parts)
