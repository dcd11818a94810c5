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
from triton.compiler import ASTSource

# compute capability -> bytes of shared memory that one program can have
SHARED_MEMORY = {80: 166912, 90: 232448}
# Of a multiprocessor; every program takes 1 KiB of shared memory more than it asks for.
NUM_REGISTERS, MAX_THREADS, RESERVED_SHARED = 65536, 2048, 1024
MAX_PROGRAMS = 32
OPTIONS = ("num_warps", "num_stages")


class Compiled(NamedTuple):
    """What one program of a compiled kernel takes."""

    num_warps: int
    registers: int  # of a thread
    stack_bytes: int  # of a thread: arrays and spilled registers
    shared_bytes: int

    def programs_per_sm(self, arch: int) -> int:
        """Programs that run at once on one multiprocessor."""
        threads = 32 * self.num_warps
        registers = threads * -(-self.registers // 8) * 8
        shared = self.shared_bytes + RESERVED_SHARED
        return min(
            NUM_REGISTERS // registers,
            (SHARED_MEMORY[arch] + RESERVED_SHARED) // shared,
            MAX_THREADS // threads,
            MAX_PROGRAMS,
        )


def compile_for(arch: int, variant: str, arguments: dict[str, Any]) -> Compiled:
    """Compile "module:kernel variant"; kernels must not be interpreted.

    Raises:
        ValueError: if it needs more shared memory than there is.
    """
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
    compiled = triton.compile(
        ASTSource(kernel, types, values, hints),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    shared = compiled.metadata.shared
    if shared > SHARED_MEMORY[arch]:
        raise ValueError(f"{shared} bytes of shared memory, there are fewer")
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(compiled.metadata.num_warps, registers, stack, shared)


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
