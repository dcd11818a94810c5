"""Every kernel type-checks for a real GPU, on machines that have none.

The interpreter is Python: it accepts loop-carried dtype changes, mixed pointer
widths and other things the compiler rejects.
"""

import os
import subprocess
import sys

import pytest

from vllm_treespec.testing.kernel_variants import SIGNATURES
from vllm_treespec.testing.offline_compile import launch_of, lower

# e4m3 has instructions from compute capability 8.9 on; vLLM refuses it before.
NEEDS_89 = "e4m3"

# One process compiles everything: importing Triton takes longer than most kernels.
SCRIPT = """
import sys, traceback
from vllm_treespec.testing.kernel_variants import SIGNATURES
from vllm_treespec.testing.offline_compile import compile_for
errors = {}
for variant, arch in eval(sys.stdin.read()):
    try:
        compile_for(arch, variant, SIGNATURES[variant])
    except Exception:
        errors[variant, arch] = traceback.format_exc()
print(errors)
"""
CASES = [
    (variant, arch)
    for variant in SIGNATURES
    for arch in (80, 90)
    if arch >= 89 or NEEDS_89 not in variant
]


@pytest.fixture(scope="module")
def errors(request: pytest.FixtureRequest) -> dict[tuple[str, int], str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    chosen = {
        (item.callspec.params["variant"], item.callspec.params["arch"])
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    }
    result = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],
        env=env,
        input=repr([case for case in CASES if case in chosen]),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return eval(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(("variant", "arch"), CASES)
def test_compiles(variant: str, arch: int, errors: dict[tuple[str, int], str]):
    assert (variant, arch) not in errors, errors[variant, arch][-2000:]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing compiles"
)
def test_the_compiler_warns_of_nothing_in_the_process_of_tests():
    name = "newest_tokens:_newest_tokens_kernel"
    assert "tt.func" in lower(90, launch_of(name, SIGNATURES[name]))
