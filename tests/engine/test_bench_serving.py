"""The serving benchmark's miniature: every method in one process, and its table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
METHODS = (
    "none",
    "ngram, 4",
    "draft_model, 2",
    *(
        "treespec draft_model, 8",
        "treespec draft_model+suffix, 8",
        "treespec suffix, 8",
    ),
)


def table(text: str, title: str) -> list[dict[str, str]]:
    """Rows of the table below a title."""
    lines = text.split(f"\n{title}\n")[1].split("\n\n")[1].splitlines()
    header, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines
    ]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_all_methods_say_the_same_and_the_table_has_ratios(tmp_path):
    written = tmp_path / "serving.md"
    script = ("benchmarks/bench_serving.py", "--small", "--minutes", "0")
    subprocess.run(
        [sys.executable, *script, "--out", str(written)],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        check=True,
    )
    text = written.read_text()
    checks = table(text, "Greedy text, before any time")
    assert [row["method"] for row in checks] == [*METHODS]
    for row in checks:
        assert row["batch"] == "2"
        if not torch.cuda.is_available():  # in half precision near ties may differ
            assert row["same_text_as_none"] == "2 of 2"
    rows = {(row["T"], row["method"]): row for row in table(text, "Serving")}
    assert len(rows) == 2 * len(METHODS)
    for (temperature, method), row in rows.items():
        speed_up, tokens = float(row["speed_up"].split()[0]), row["tokens_per_step"]
        assert speed_up > 0 and float(row["speed_up_over_chains"]) > 0
        if method == "none":
            assert (speed_up, tokens) == (1, "1.00")
        elif temperature == "0.00" and "draft_model" in method:
            assert float(tokens) > 1.2, f"{method} drafts in vain"
        # Times of interpreted kernels are nobody's business.
        assert ("ms_per_token" in row) == torch.cuda.is_available()
