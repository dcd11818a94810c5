"""``vllm serve`` on this machine, in processes of its own, with the bundled models."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

MODELS = Path(__file__).parents[2] / "models/python-stdlib"
TARGET, DRAFT = MODELS / "target", MODELS / "draft"
VLLM = Path(sys.executable).with_name("vllm")
TREE = {
    "method": "treespec",
    "num_speculative_tokens": 8,
    "tree": {
        "proposers": [
            {"type": "draft_model", "model": str(DRAFT), "depth": 3, "width": 2},
            {"type": "suffix"},
            {"type": "ngram"},
        ]
    },
}
PROMPT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"


def command(
    speculative: dict[str, Any] | None, port: int, num_api_servers: int = 1
) -> list[str]:
    extra = ["--api-server-count", str(num_api_servers)]
    if speculative is not None:
        extra += ["--speculative-config", json.dumps(speculative)]
    return [
        *(str(VLLM), "serve", str(TARGET), "--served-model-name", "tiny"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(2**25), *extra),
    ]


def environment() -> dict[str, str]:
    # This process runs engines in-process; the server must not.
    env = {
        key: value
        for key, value in os.environ.items()
        if key != "VLLM_ENABLE_V1_MULTIPROCESSING"
    }
    return {
        **env,
        "PYTHONSAFEPATH": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        # Endpoints are added to a server only by name, see docs/operations.md.
        "VLLM_PLUGINS": "treespec,treespec_cpu_host",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    speculative: dict[str, Any] | None, log: Path, num_api_servers: int = 1
) -> Iterator[int]:
    """A running server; yields its port."""
    port = free_port()
    with log.open("w") as output:
        server = subprocess.Popen(
            command(speculative, port, num_api_servers),
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_ready(server, port, log)
        yield port
    finally:
        server.terminate()
        server.wait(60)


def connect(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")


def wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 240
    with connect(port) as client:
        while time.monotonic() < deadline:
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                client.models.list()
                return
            except openai.APIConnectionError:
                time.sleep(1)
    raise AssertionError("the server did not answer: " + log.read_text()[-4000:])
