"""The first run on a GPU: what it is given, and that failures are told."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_first_run.sh"


def first_run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=inherited | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_run_without_time_for_its_steps_fails(tmp_path: Path):
    ended = first_run(str(tmp_path), MINUTES="0")
    assert "no time was left" in (tmp_path / "README.md").read_text()
    assert ended.returncode == 1


def test_it_wants_one_folder():
    ended = first_run()
    assert ended.returncode == 2 and "usage" in ended.stderr
