"""Runs vLLM's Model Runner V2, Triton kernels included, on a CPU. Test tooling only.

Triton has no CPU compiler here, so kernels run in its interpreter
(``TRITON_INTERPRET=1``); vLLM only uses Triton on a CPU when a backend of the name
``cpu`` exists, which ``triton_backend`` provides.
"""

import os

from treespec_cpu_host import async_scheduling, interpreter


def register() -> None:
    """vLLM plugin: repair the interpreter, and allow async scheduling on request."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter.install()
    async_scheduling.install()
