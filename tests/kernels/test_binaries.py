"""No batch makes a kernel compile that has served another: a server would stand still."""

import os
import subprocess
import sys

SCRIPT = """
import collections
from vllm_treespec.testing.offline_launches import MAX_REQS, Step, binaries
with binaries(arch=90) as needed:
    step = Step(num_proposers=2)
    for num_reqs in range(1, MAX_REQS + 1):
        step.launch(num_reqs)
print(dict(collections.Counter(each.name for each in needed)))
"""


def test_one_binary_serves_all_batches():
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", SCRIPT]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    num_binaries = eval(result.stdout.splitlines()[-1])
    assert len(num_binaries) >= 16, "a step launches that many kernels"
    assert set(num_binaries.values()) == {1}, num_binaries
