"""vLLM's own benchmark client reads trees right: its summary is the server's metrics."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.servers import DRAFT, TARGET, connect
from vllm_treespec.testing.servers import VLLM, Scrape, Server, environment, serving

NUM_NODES, DEPTH = 8, 3
NUM_PROMPTS, NUM_TOKENS = 4, 16
PROPOSER = {
    "type": "draft_model",
    "model": str(DRAFT),
    "depth": DEPTH,
    "width": 3,
}
TREE = {
    "method": "treespec",
    "num_speculative_tokens": NUM_NODES,
    "tree": {
        "proposers": [PROPOSER],
        "adaptive": False,
        # Whole trees, so that every step has one; only a CPU's host cuts them.
        **({} if torch.cuda.is_available() else {"min_probability": 0.0}),
    },
}


def bench(server: Server, directory: Path) -> tuple[str, dict[str, Any]]:
    """What ``vllm bench serve`` prints and what it saves."""
    result = subprocess.run(
        [
            *(str(VLLM), "bench", "serve", "--base-url", server.url),
            *("--model", "tiny", "--tokenizer", str(TARGET)),
            *("--dataset-name", "random", "--random-input-len", "24"),
            *("--random-output-len", str(NUM_TOKENS), "--ignore-eos"),
            *("--num-prompts", str(NUM_PROMPTS), "--temperature", "0"),
            *("--disable-tqdm", "--save-result", "--result-dir", str(directory)),
            *("--result-filename", "bench.json"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout, json.loads((directory / "bench.json").read_text())


def ask_once(server: Server) -> None:
    with connect(server) as client:
        client.completions.create(model="tiny", prompt="def add(", max_tokens=8)


def counts(server: Server) -> list[float]:
    """Trees, nodes, accepted ones, and those by position."""
    metrics = Scrape(server)
    return [
        metrics("spec_decode_num_drafts_total"),
        metrics("spec_decode_num_draft_tokens_total"),
        metrics("spec_decode_num_accepted_tokens_total"),
        *(
            metrics("spec_decode_num_accepted_tokens_per_pos_total", position=str(each))
            for each in range(NUM_NODES)
        ),
    ]


def printed(summary: str, what: str) -> float:
    found = re.search(rf"^\s*{re.escape(what)}:\s+([\d.]+)", summary, re.MULTILINE)
    assert found, f"{what!r} is not in {summary}"
    return float(found[1])


def test_the_summary_is_what_the_server_counted(tmp_path: Path):
    with serving(TARGET, TREE, tmp_path / "server.log") as server:
        ask_once(server)  # so that the counters do not start at 0
        before = counts(server)
        summary, saved = bench(server, tmp_path)
        after = counts(server)
    trees, nodes, accepted, *by_position = (
        late - early for late, early in zip(after, before, strict=True)
    )
    assert saved["completed"] == NUM_PROMPTS
    assert min(before[:3]) > 0
    assert printed(summary, "Drafts") == saved["spec_decode_num_drafts"] == trees
    assert (
        printed(summary, "Draft tokens") == saved["spec_decode_draft_tokens"] == nodes
    )
    assert printed(summary, "Accepted tokens") == accepted > 0
    rate, length = 100 * accepted / nodes, 1 + accepted / trees
    assert printed(summary, "Acceptance rate (%)") == pytest.approx(rate, abs=0.005)
    assert printed(summary, "Acceptance length") == pytest.approx(length, abs=0.005)
    for position, count in enumerate(by_position):
        share = printed(summary, f"Position {position}")
        assert share == pytest.approx(100 * count / trees, abs=0.005)
    # Positions are depths: as many rows as nodes, but nothing below the deepest.
    assert sum(by_position) == accepted
    assert by_position == sorted(by_position, reverse=True)
    assert by_position[DEPTH - 1] > 0
    assert not any(by_position[DEPTH:])
    # What clients got: a token of each prompt's own and what the trees emitted, of which
    # the last may reach beyond the end. A tree scheduled ahead may follow the end, too.
    emitted = trees + accepted
    wanted = NUM_PROMPTS * (NUM_TOKENS - 1)
    assert wanted <= emitted <= wanted + NUM_PROMPTS * DEPTH
