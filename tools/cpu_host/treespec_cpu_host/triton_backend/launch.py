"""Loads a compiled kernel and calls it: arguments travel as one packed struct.

Programs run on torch's own OpenMP threads, so that OMP_NUM_THREADS and the cores that
vLLM binds threads to hold for them too.
"""

from __future__ import annotations

import ctypes
import struct
import tempfile
from typing import Any

import torch

# Triton's name of a type -> the struct module's; floats of all sizes travel as doubles.
FORMATS = {
    "i1": "?", "u1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i",
    "u32": "I", "i64": "q", "u64": "Q", "fp16": "d", "bf16": "d", "fp32": "d",
    "f32": "d", "fp64": "d", "f64": "d",
}  # fmt: skip


def load(binary: bytes) -> tuple[Any, Any]:
    # The loader wants a file; it may go as soon as it is mapped.
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(binary)
        file.flush()
        # Holds the GIL: launches are short, and releasing it invites other threads.
        library = ctypes.PyDLL(file.name)
    function = library.launch
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
    function.restype = ctypes.c_char_p
    return library, function


def _openmp() -> int:
    """Address of the function that runs another on torch's threads."""
    library = ctypes.CDLL(torch._C.__file__)
    return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0


class Launcher:
    """Calls a compiled kernel with the arguments that are no constants."""

    def __init__(self, source: Any, metadata: Any) -> None:
        types = list(source.signature.values())
        given = [(n, each) for n, each in enumerate(types) if each != "constexpr"]
        self._numbers = [(n, each.startswith("*")) for n, each in given]
        formats = ["P" if each.startswith("*") else FORMATS[each] for _, each in given]
        self._pack = struct.Struct("iii" + "".join(formats)).pack
        self._parallel = _openmp()

    def __call__(self, grid_0: int, grid_1: int, grid_2: int, stream: Any, function: Any,
                 packed: Any, launch_metadata: Any, enter: Any, leave: Any, *args: Any) -> None:  # fmt: skip
        values = [
            args[n].data_ptr() if is_pointer else args[n]
            for n, is_pointer in self._numbers
        ]
        arguments = self._pack(grid_0, grid_1, grid_2, *values)
        if enter is not None:
            enter(launch_metadata)
        failure = function(arguments, self._parallel, torch.get_num_threads())
        if leave is not None:
            leave(launch_metadata)
        if failure:
            raise AssertionError(failure.decode())
