"""All benchmarks within some minutes, and their tables.

    python benchmarks/all.py [--minutes 9]

Tables of serving, steps, drafting and kernels go to benchmarks/results, in this order, for
what does not fit the time is left out. Replays of drafted text need no GPU and take long:
of them only a miniature runs, to show that they are alive.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
HAS_GPU = os.path.exists("/dev/nvidiactl")
KERNELS = ("build", "compact_kv", "tree_attention") if HAS_GPU else ()
REPLAYS = ("draft_trees", "verification_rules")
# Of all time for serving's rounds; its engines start and are checked before.
ROUNDS = 0.3


class Failed(Exception):
    """A script ended badly or did not end in time."""


def run(name: str, *options: str, seconds: float) -> str:
    """What the script prints; it is shown as well."""
    command = [sys.executable, str(HERE / f"bench_{name}.py"), *options]
    begin = time.monotonic()
    print(
        f"\n$ python {' '.join([f'benchmarks/bench_{name}.py', *options])}", flush=True
    )
    try:
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{name}: not done within {seconds:.0f} s") from error
    print(f"{ended.stdout}\n({time.monotonic() - begin:.0f} s)", flush=True)
    if ended.returncode:
        raise Failed(f"{name}: exit status {ended.returncode}")
    return ended.stdout


def keep(name: str, tables: str) -> None:
    """In a file for scripts that write none."""
    commit = subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True
    ).strip()
    head = (
        f"# {name}\n\n```\npython benchmarks/bench_{name}.py\n```\n\nCommit {commit}.\n"
    )
    (HERE / f"results/{name}.md").write_text(head + tables)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    minutes = parser.parse_args().minutes
    deadline = time.monotonic() + 60 * minutes
    failures = []

    def attempt(name: str, *options: str, keeps: bool = False) -> None:
        try:
            tables = run(name, *options, seconds=deadline - time.monotonic())
            if keeps:
                keep(name, tables)
        except Failed as error:
            failures.append(str(error))

    attempt("serving", "--minutes", f"{ROUNDS * minutes:.1f}")
    attempt("step")
    attempt("draft_phase", keeps=HAS_GPU)
    for name in KERNELS:
        attempt(name, keeps=True)
    for name in REPLAYS:
        attempt(name, "--quick")
    print("\n".join(failures))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
