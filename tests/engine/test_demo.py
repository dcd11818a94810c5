"""make demo, with the bundled model and short answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_shows_the_same_answers_and_a_tree_and_warns_of_nothing():
    model = str(ROOT / "models/python-stdlib/target")
    ended = subprocess.run(
        [sys.executable, "examples/demo.py", "--model", model, "--max-tokens", "24"],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.count("> Why is the sky blue?") == 2, "both engines answer"
    assert "NO" not in ended.stdout.split()
    table = [line for line in ended.stdout.splitlines() if line.startswith("│ ")]
    assert [line.split()[1] for line in table] == [
        "explain",
        "list",
        "code",
        "edit",
        "story",
        "all",
    ]
    assert all(line.strip("│ ").endswith("x") for line in table)
    assert ended.stderr == "", "nothing that a newcomer could do nothing about"
