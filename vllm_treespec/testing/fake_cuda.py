"""CUDA graphs, streams and events on a machine without any, that can be looked into.

A graph records what torch's dispatcher and Triton are asked to do, and replays it: the
same operations on the same memory, whatever Python has meanwhile come to think. It
refuses what CUDA refuses (the default stream, waiting while it captures), and what CUDA
does not notice: memory that nobody holds any more.
"""

from __future__ import annotations

import gc
import inspect
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from vllm_treespec.testing.no_sync import NoSync


class FakeStream:
    """A stream: everything is done at once, so there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, other: FakeStream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class FakeEvent:
    """Happens once a few others have been recorded, or when it is waited for."""

    DELAY = 2
    num_recorded = 0
    waits: ClassVar[
        list[str]
    ] = []  # where somebody waited for one that had not happened

    def __init__(self, *_: Any, **__: Any) -> None:
        self._due = 0

    def record(self, stream: FakeStream | None = None) -> None:
        FakeEvent.num_recorded += 1
        self._due = FakeEvent.num_recorded + self.DELAY

    def query(self) -> bool:
        return FakeEvent.num_recorded >= self._due

    def synchronize(self) -> None:
        if not self.query():
            FakeEvent.waits.append(_caller())
            self._due = 0


class FakeGraph:
    """What was launched while it was recorded, in order."""

    def __init__(self, cuda: FakeCuda | None = None, *_: Any, **__: Any) -> None:
        self._cuda = cuda or FakeCuda.current
        self.log: list[Callable[[], None]] = []
        # Storages that were there before, by address: what the graph relies on.
        self.memory: dict[int, torch.UntypedStorage] = {}
        self.users: dict[int, str] = {}  # who was the first to use it
        self._own: dict[int, torch.UntypedStorage] = {}  # the graph pool's
        self.where = _caller()
        self.num_replays = 0

    def replay(self) -> None:
        self._cuda.check_reachable(self)
        self.num_replays += 1
        for launch in self.log:
            launch()

    def reset(self) -> None:
        self.log, self.memory, self.users, self._own = [], {}, {}, {}

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def reads(self, user: Any, values: Any) -> None:
        """Remember the memory behind these arguments, unless the graph allocated it."""
        for tensor in _tensors(values):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if storage.nbytes() and place not in self._own and place not in self.memory:
                self.memory[place] = storage
                self.users[place] = (
                    f"{storage.nbytes()} bytes for {user} at {_caller()}"
                )

    def allocates(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self.memory:
            self._own[storage.data_ptr()] = storage


class _Recorder(NoSync):  # type: ignore[no-untyped-call]  # torch's
    """Runs operations and writes them into a graph. Nothing may wait meanwhile."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self._graph = graph
        self._running: Any = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if self._in_kernel:
            return func(*args, **named)
        if func.namespace == "vllm":
            # A Python function behind an operator: what it launches is recorded.
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **named)
        with self:  # in inference mode, operations made of others come as they are
            result = func.decompose(*args, **named)
        if result is not NotImplemented:
            return result
        self._see(func, args, named)
        if func is torch.ops.aten.lift_fresh.default:
            # A number of the host's that becomes part of a launch, or a copy from there.
            assert args[0].dim() == 0, "values are copied from the host"
            self._graph.allocates(args[0])
        self._graph.reads(func, (args, named))
        result = func(*args, **named)
        self._record(func, args, named, result)
        return result

    def launch(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Record a call as one launch, whatever it is made of here."""
        self._graph.reads(function, (args, named))
        self._in_kernel = True
        try:
            result = function(*args, **named)
        finally:
            self._in_kernel = False
        self._graph.log.append(lambda: function(*args, **named))
        return result

    def _record(
        self, func: Any, args: Sequence[Any], named: dict[str, Any], result: Any
    ) -> None:
        outputs = _tensors(result)
        for output in outputs:
            self._graph.allocates(output)
        if func.is_view:
            return

        def again() -> None:
            for output, value in zip(
                outputs, _tensors(func(*args, **named)), strict=True
            ):
                if value.data_ptr() != output.data_ptr():
                    output.copy_(value)

        self._graph.log.append(again)


class FakeCuda:
    """Stands in for the parts of ``torch.cuda`` that engines use: ``with fake: ...``"""

    current: FakeCuda

    def __init__(self) -> None:
        self.default = FakeStream()
        self.stream = self.default
        self.graphs: list[FakeGraph] = []
        self.num_prepared = 0  # entries into what prepares for capturing
        self.roots: list[Any] = []  # what must hold the memory of replayed graphs
        self._recorder: _Recorder | None = None
        self._checked: set[int] = set()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> FakeCuda:
        FakeCuda.current = self
        FakeEvent.waits = []
        for owner, name, value in (
            (torch.cuda, "Stream", FakeStream),
            (torch.cuda, "Event", FakeEvent),
            (torch.cuda, "CUDAGraph", FakeGraph),
            (torch.cuda, "graph", self.graph),
            (torch.cuda, "stream", self.on_stream),
            (torch.cuda, "set_stream", self.set_stream),
            (torch.cuda, "current_stream", lambda *_: self.stream),
            (torch.cuda, "default_stream", lambda *_: self.default),
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.accelerator, "synchronize", lambda *_: None),
            (torch.accelerator, "empty_cache", lambda *_: None),
            (torch.accelerator, "get_memory_info", lambda *_: (2**36, 2**37)),
            (JITFunction, "run", self._wrapped_launch(JITFunction.run)),
        ):
            self.replace(owner, name, value)
        return self

    def __exit__(self, *raised: Any) -> None:
        while self._undo:
            self._undo.pop()()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Until the end."""
        before = inspect.getattr_static(owner, name)  # a method as it is declared
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before))

    def set_stream(self, stream: FakeStream) -> None:
        self.stream = stream

    @contextmanager
    def on_stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.stream
        torch.cuda.set_stream(stream)  # type: ignore[arg-type]
        try:
            yield
        finally:
            torch.cuda.set_stream(before)  # type: ignore[arg-type]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside, whatever graphs need has been prepared, collectives for one."""
        self.num_prepared += 1
        try:
            yield
        finally:
            self.num_prepared -= 1

    @contextmanager
    def graph(
        self, graph: FakeGraph, pool: Any = None, stream: Any = None, **_: Any
    ) -> Iterator[None]:
        """``torch.cuda.graph``."""
        with self.on_stream(stream or FakeStream()):
            assert self.stream is not self.default, (
                "CUDA graphs must be captured on a non-default stream"
            )
            assert self.num_prepared, "nothing was prepared for capturing"
            assert self._recorder is None, "a graph is being captured already"
            self._recorder = _Recorder(graph)
            try:
                with self._recorder:
                    yield
            finally:
                self._recorder = None
        self.graphs.append(graph)

    def as_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as one launch."""

        def launched(*args: Any, **named: Any) -> Any:
            recorder = self._recorder
            if recorder is None or recorder._in_kernel:
                return function(*args, **named)
            return recorder.launch(function, *args, **named)

        return launched

    def memory_changed(self) -> None:
        """Somebody let go of memory: look again before the next replays."""
        self._checked.clear()

    def check_reachable(self, graph: FakeGraph) -> None:
        """
        Raises:
            AssertionError: if the graph uses memory that the roots no longer hold.
        """
        if id(graph) in self._checked:
            return
        held = reachable_storages(self.roots)
        lost = [graph.users[place] for place in graph.memory if place not in held]
        assert not lost, (
            f"the graph captured at {graph.where} uses memory that nobody holds: {lost}"
        )
        self._checked.add(id(graph))

    def _wrapped_launch(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(jit: Any, *args: Any, **named: Any) -> Any:
            recorder = self._recorder
            if recorder is None or recorder._in_kernel:
                return run(jit, *args, **named)
            return recorder.launch(run, jit, *args, **named)

        return launch


# Through these, everything would be reachable; and graphs hold nothing on a GPU.
_DEAD_ENDS = (
    type,
    types.ModuleType,
    types.FrameType,
    types.CodeType,
    types.TracebackType,
    str,
    bytes,
    int,
    float,
    torch.dtype,
    FakeGraph,
    FakeCuda,
    TorchDispatchMode,
)


def reachable_storages(roots: Sequence[Any]) -> dict[int, int]:
    """Address -> bytes of all tensors that these objects hold, however deep."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo = deque(roots)
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, _DEAD_ENDS):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        if isinstance(each, types.FunctionType):
            # Not its globals.
            todo.extend(cell.cell_contents for cell in each.__closure__ or () if cell)
            todo.extend((each.__dict__, each.__defaults__))
            continue
        todo.extend(gc.get_referents(each))
    return storages


def _tensors(values: Any) -> list[torch.Tensor]:
    return [
        each
        for each in _pytree.tree_leaves(values)
        if isinstance(each, torch.Tensor) and each.layout == torch.strided
    ]


def _caller() -> str:
    """Where outside of this file and the libraries we are."""
    import traceback

    for frame in reversed(traceback.extract_stack()):
        own = frame.filename == __file__ or "/contextlib" in frame.filename
        if not own and "/torch/" not in frame.filename:
            return f"{frame.filename}:{frame.lineno}"
    return "?"
