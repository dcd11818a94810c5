"""Counts what a GPU would be told to do, on a machine that has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from vllm_treespec.core.kernel_set import KernelSet

# Beside views, what makes the device do nothing.
IDLE = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view")


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Operations by phase: ``with launches, launches.during("build"): ...``.

    An operation of torch counts as one launch unless it is a view or an allocation, and
    so does a copy; a few take more. A function of a wrapped ``KernelSet`` counts as
    one, whatever it is made of here; ``gather_trees`` and a split ``tree_attention`` are
    two.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.names: dict[str, Counter[str]] = {}  # phase -> operation -> launches
        self._phase: str | None = None
        self._in_kernel = False

    def __getitem__(self, phase: str) -> int:
        return self.names.get(phase, Counter()).total()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is launched inside belongs to this phase; elsewhere it is not counted."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def wrap(self, kernels: KernelSet) -> KernelSet:
        """The same kernels, each counted as one launch."""
        return KernelSet(
            **{
                name: self.counted(name, getattr(kernels, name))
                for name in KernelSet.__slots__
            }
        )

    def counted(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """A function that counts as one launch, whatever it is made of here."""

        def counted(*args: Any, **options: Any) -> Any:
            self._add(name)
            self._in_kernel = True
            try:
                return kernel(*args, **options)
            finally:
                self._in_kernel = False

        return counted

    def _add(self, name: str) -> None:
        if self._phase is not None:
            self.names.setdefault(self._phase, Counter())[name] += 1

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        with self:  # in inference mode, operations made of others come as they are
            result = func.decompose(*args, **named)
        if result is not NotImplemented:
            return result
        if not self._in_kernel:
            self._see(func, args, named)
        return func(*args, **named)

    def _see(self, func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> None:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in IDLE:
            self._add(name)
