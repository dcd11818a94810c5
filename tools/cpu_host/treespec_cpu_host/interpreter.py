"""Two repairs of Triton 3.9's interpreter that vLLM's own kernels need.

- A comparison yields a handle of the operands' dtype instead of int1, so splatting a
  scalar comparison makes an integer mask, which loads and stores refuse.
- ``tl.range`` yields Python ints, on which kernels cannot call ``.to``.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any


@functools.cache
def install() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle

    def as_bool(mask: Any) -> Any:
        if mask is None or mask.data.dtype == np.bool_:
            return mask
        return handle(mask.data.astype(np.bool_), tl.int1)

    splat = builder.create_splat

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        if arg.data.dtype == np.bool_:
            return handle(np.full(ret_ty.shape, arg.data, dtype=np.bool_), tl.int1)
        return splat(self, ret_ty, arg)

    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw
    builder.create_splat = create_splat
    builder.create_masked_load = lambda self, ptr, mask, *rest: load(
        self, ptr, as_bool(mask), *rest
    )
    builder.create_masked_store = lambda self, ptr, value, mask, *rest: store(
        self, ptr, value, as_bool(mask), *rest
    )
    builder.create_atomic_rmw = lambda self, op, ptr, value, mask, *rest: atomic(
        self, op, ptr, value, as_bool(mask), *rest
    )
    interpreter._patch_lang_core = _with_tensor_range(interpreter._patch_lang_core)


def _with_tensor_range(patch: Callable[..., None]) -> Callable[..., None]:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def tensor_range(
        start: int, stop: int | None = None, step: int | None = None, **_: Any
    ) -> Iterator[tl.tensor]:
        first, last = (0, start) if stop is None else (start, stop)
        for value in range(first, last, step or 1):
            yield tl.tensor(
                TensorHandle(np.array([value], np.int32), tl.int32), tl.int32
            )

    def patched(lang: Any, scope: Any) -> None:
        patch(lang, scope)
        scope.set_attr(lang, "range", tensor_range)

    return patched
