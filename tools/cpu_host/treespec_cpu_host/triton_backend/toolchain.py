"""The C compiler of this machine: found once, asked once what machine it is for."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HEADERS = Path(__file__).parent
# -O3 takes four times as long and its code is no faster.
# No reassociation and no assumptions on infinities: kernels use both zeros and -inf.
FLAGS = [
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-std=gnu17",
    "-w",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
    "-fno-strict-aliasing",
]
NATIVE = ("-march=native", "-mprefer-vector-width=512")


@dataclass(frozen=True)
class Toolchain:
    command: str
    machine: tuple[str, ...] = NATIVE

    def library(self, name: str, source: str) -> bytes:
        """The shared library of a kernel's C."""
        with tempfile.TemporaryDirectory() as folder:
            unit, library = Path(folder, "kernel.c"), Path(folder, "kernel.so")
            unit.write_text(source)
            result = self._run(f"-I{HEADERS}", str(unit), "-o", str(library), "-lm")
            if result.returncode:
                raise RuntimeError(
                    f"{name}: {self.command} refuses its C:\n{result.stderr.decode()[:3000]}"
                )
            return library.read_bytes()

    @functools.cached_property
    def version(self) -> str:
        """Changes with this package, the compiler, its flags and the machine.

        ``-march=native`` means another machine elsewhere, and caches may be shared.
        """
        host = self._run("-Q", "--help=target", "--version").stdout
        files = b"".join(each.read_bytes() for each in sorted(HEADERS.glob("*.[ph]*")))
        return hashlib.sha256(host + files + repr(self).encode()).hexdigest()

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [self.command, *FLAGS, *self.machine, *arguments], capture_output=True
        )


@functools.cache
def find() -> Toolchain | None:
    """What $CC names, or else the first of the usual names that is installed."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "cc", "clang"]
    found = next(filter(None, map(shutil.which, names)), None)
    return Toolchain(found) if found else None
