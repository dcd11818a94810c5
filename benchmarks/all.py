"""All benchmarks within some minutes, and their tables.

    python benchmarks/all.py [--minutes 9]

Tables of kernels, of serving and of a step go to benchmarks/results; the replays of
drafted text, whose full runs take long and need no GPU, run in miniature to show that
they are alive, and write nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
# Engines of the serving benchmark start and are checked before its rounds.
SERVING_START = 2.5  # minutes
KERNELS = ("build", "compact_kv", "tree_attention", "draft_phase")
REPLAYS = {"draft_trees": ["--quick"], "verification_rules": ["--quick"]}


class Outcome(NamedTuple):
    script: str
    seconds: float
    outcome: str


def run(name: str, *options: str, keeps: bool = False, deadline: float) -> Outcome:
    """One script; ``keeps`` what it prints as its table."""
    begin = time.monotonic()
    command = [sys.executable, str(HERE / f"bench_{name}.py"), *options]
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    output = subprocess.PIPE if keeps else None
    try:
        ended = subprocess.run(
            command, stdout=output, text=True, timeout=max(1, deadline - begin)
        )
        outcome = "done" if ended.returncode == 0 else f"FAILED, {ended.returncode}"
    except subprocess.TimeoutExpired:
        outcome = "FAILED, out of time"
    else:
        if keeps and ended.returncode == 0:
            print(ended.stdout)
