"""Where there is no C compiler, Triton's interpreter takes over.

Triton imports its backends before it looks at TRITON_INTERPRET for the first time, so
this is early enough for every kernel of the process and of the processes it starts.
"""

from __future__ import annotations

import os
import sys

from treespec_cpu_host.triton_backend import toolchain


def unless_compiled() -> None:
    import torch

    if "TRITON_INTERPRET" in os.environ or torch.cuda.is_available():
        return
    if toolchain.find() is None:
        os.environ["TRITON_INTERPRET"] = "1"
        print(
            "treespec_cpu_host: found no C compiler (gcc, cc, clang or $CC): Triton "
            "kernels are interpreted, which is a hundred times slower",
            file=sys.stderr,
        )
