"""``vllm serve`` in processes of its own, on this machine, and what it says of itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch
from prometheus_client.parser import text_string_to_metric_families

VLLM = Path(sys.executable).with_name("vllm")
MODEL_NAME = "tiny"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that was started on this machine. ``log`` is its output."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 480
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                with urlopen(f"{self.url}/health"):
                    return
            except URLError:
                time.sleep(1)
        raise AssertionError("the server is mute: " + self.log.read_text()[-4000:])

    def resident_mb(self) -> float:
        """Of all its processes; pages that they share count for each."""
        return _resident_mb(self.process.pid)


def command(
    model: Path, speculative: dict[str, Any] | None, port: int, *extra: str
) -> list[str]:
    """Of two values of an option the last one counts, so ``extra`` may overrule."""
    if speculative is not None:
        extra = ("--speculative-config", json.dumps(speculative), *extra)
    return [
        *(str(VLLM), "serve", str(model), "--served-model-name", MODEL_NAME),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(2**25), *extra),
    ]


def environment() -> dict[str, str]:
    # A process that runs engines within itself may want this; the server must not.
    env = {
        key: value
        for key, value in os.environ.items()
        if key != "VLLM_ENABLE_V1_MULTIPROCESSING"
    }
    env |= {"PYTHONSAFEPATH": "1", "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1"}
    env.pop("VLLM_PLUGINS", None)
    if not torch.cuda.is_available():
        env |= {"VLLM_USE_V2_MODEL_RUNNER": "1"}
        env |= {"VLLM_CPU_CI_ENV": "1"}  # no warm-up
        # Bound, every server's worker would sit on the same first core.
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return env


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def launched(
    model: Path, speculative: dict[str, Any] | None, log: Path, *extra: str
) -> Iterator[Server]:
    """A server that starts; ``extra`` are more words of its command line."""
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            command(model, speculative, port, *extra),
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(port, process, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:  # while it starts, it may not listen
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def serving(
    model: Path, speculative: dict[str, Any] | None, log: Path, *extra: str
) -> Iterator[Server]:
    """A server that answers."""
    with launched(model, speculative, log, *extra) as server:
        server.wait_until_ready()
        yield server


class Scrape:
    """What ``/metrics`` says, asked by name and, if need be, labels."""

    def __init__(self, server: Server) -> None:
        with urlopen(f"{server.url}/metrics") as response:
            text = response.read().decode()
        self._samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def __call__(self, name: str, **labels: str) -> float:
        found = [
            sample
            for sample in self._samples
            if sample.name == f"vllm:{name}" and labels.items() <= sample.labels.items()
        ]
        assert found, f"no series {name} {labels}"
        for sample in found:
            assert sample.labels["model_name"] == MODEL_NAME
            assert sample.labels["engine"] == "0"
        return float(sum(sample.value for sample in found))


def _resident_mb(pid: int) -> float:
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
        children = " ".join(task.read_text() for task in tasks).split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0  # it has just ended
    own = resident * os.sysconf("SC_PAGE_SIZE") / 2**20
    return own + sum(_resident_mb(int(child)) for child in children)
