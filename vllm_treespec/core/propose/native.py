"""Machine code over NumPy arrays, without the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

F = TypeVar("F", bound=Callable[..., object])
Scalar = TypeVar("Scalar", bound=np.generic)


def native(function: F) -> F:
    """Compiled at the first call, then cached on disk next to the source.

    The cache looks at the caller's file only: after editing a native function that
    another file calls, touch that file too.
    """
    return cast(F, numba.njit(nogil=True, cache=True)(function))


@native
def signed(value: np.unsignedinteger[Any]) -> int:
    """Numba keeps ``int(unsigned)`` unsigned, and mixing the two makes floats."""
    return np.int64(value)  # type: ignore[return-value]  # an int once compiled


def frozen(array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """A read-only view: one compiled version serves read-only and writable arrays."""
    assert array.flags.c_contiguous, "another layout would compile during a request"
    view = array.view()
    view.flags.writeable = False
    return view
