"""How kernels come out of the compiler for a GPU that need not be there."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

# compute capability -> bytes of shared memory that one program can have
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MAX_THREADS = {80: 2048, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
# Of a multiprocessor; every program takes 1 KiB of shared memory more than it asks for.
NUM_REGISTERS, RESERVED_SHARED = 65536, 1024
MAX_PROGRAMS = 32
OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """A kernel with the types and constants of a launch."""

    name: str
    source: ASTSource
    options: dict[str, Any]


class Compiled(NamedTuple):
    """What one program of a compiled kernel takes."""

    num_warps: int
    registers: int  # of a thread
    stack_bytes: int  # of a thread: arrays and spilled registers
    shared_bytes: int
    tiles_ahead: int = 0  # of keys and values, on their way while one is at work

    def programs_per_sm(self, arch: int) -> int:
        """Programs that run at once on one multiprocessor."""
        threads = 32 * self.num_warps
        registers = threads * -(-self.registers // 8) * 8
        shared = self.shared_bytes + RESERVED_SHARED
        return min(
            NUM_REGISTERS // registers,
            (SHARED_MEMORY[arch] + RESERVED_SHARED) // shared,
            MAX_THREADS[arch] // threads,
            MAX_PROGRAMS,
        )


def launch_of(variant: str, arguments: dict[str, Any]) -> Launch:
    """That of "module:kernel variant"; kernels must not be interpreted."""
    module, name = variant.split()[0].split(":")
    kernel = getattr(importlib.import_module(f"vllm_treespec.kernels.{module}"), name)
    options = {key: arguments[key] for key in OPTIONS if key in arguments}
    arguments = {key: each for key, each in arguments.items() if key not in OPTIONS}
    types = {k: v if isinstance(v, str) else "constexpr" for k, v in arguments.items()}
    values = {k: v for k, v in arguments.items() if not isinstance(v, str)}
    # What a launch finds in aligned tensors: such loads are staged in shared memory.
    hints = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, value in arguments.items()
        if isinstance(value, str) and (value[0] == "*" or "_stride" in name)
    }
    return Launch(name, ASTSource(kernel, types, values, hints), options)


def compile_for(arch: int, variant: str, arguments: dict[str, Any]) -> Compiled:
    """Compile "module:kernel variant"; kernels must not be interpreted.

    Raises:
        ValueError: if it needs more shared memory than there is.
    """
    launch = launch_of(variant, arguments)
    compiled = triton.compile(
        launch.source, target=GPUTarget("cuda", arch, 32), options=launch.options
    )
    shared = compiled.metadata.shared
    if shared > SHARED_MEMORY[arch]:
        raise ValueError(f"{shared} bytes of shared memory, there are fewer")
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(
        compiled.metadata.num_warps,
        registers,
        stack,
        shared,
        pipeline(compiled.asm["ttgir"]).tiles_ahead,
    )


class _LoweredError(Exception):
    """Carries what is known by then past the rest of the compiler."""


def lower(arch: int, launch: Launch) -> str:
    """A launch in Triton's GPU dialect: all of Triton's own work, a third of the time."""
    found: list[str] = []

    def stop(module: Any, metadata: Any) -> None:
        found.append(str(module))
        raise _LoweredError

    def add_stages(self: Any, stages: dict[str, Any], *others: Any) -> None:
        original(self, stages, *others)
        stages["llir"] = stop

    original = CUDABackend.add_stages
    CUDABackend.add_stages = add_stages
    try:
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(launch.source, target=target, options=launch.options)
        ttgir: str = compiled.asm["ttgir"]  # it was in Triton's cache
        return ttgir
    except _LoweredError:
        return found[0]
    finally:
        CUDABackend.add_stages = original


class Pipeline(NamedTuple):
    """How the loop over tiles of keys fetches them, by Triton's GPU dialect."""

    num_buffers: int  # of keys, as many for values
    tiles_ahead: int


def pipeline(ttgir: str) -> Pipeline:
    """Of the first loop that copies asynchronously; zeros if none does."""
    buffers = re.search(
        r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir
    )
    waits = re.search(r"ttg\.async_wait .*?num = (\d+)", ttgir)
    if not (buffers and waits):
        return Pipeline(0, 0)
    # Keys and values are a copy each. What need not have come may still be on its way,
    # and one tile more is asked for thereupon.
    return Pipeline(int(buffers[1]), int(waits[1]) // 2 + 1)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump reports the resources of every kernel, not {usage!r}"
    return int(found[1]), int(found[2])
