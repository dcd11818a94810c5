"""``vllm serve`` with the flag, in processes of its own, asked over HTTP."""

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
from urllib.request import urlopen

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

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
NUM_ASKED = 5  # requests of ``ask_everything``
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
    return {**env, "PYTHONSAFEPATH": "1", "VLLM_LOGGING_LEVEL": "INFO"}


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


def ask_everything(client: openai.OpenAI) -> dict[str, Any]:
    common: dict[str, Any] = {"model": "tiny", "max_tokens": 32, "temperature": 0.0}
    messages: Any = [{"role": "user", "content": PROMPT}]
    completion = client.completions.create(prompt=PROMPT, **common)
    with client.completions.create(prompt=PROMPT, stream=True, **common) as parts:
        streamed = list(parts)
    chat = client.chat.completions.create(messages=messages, **common)
    with client.chat.completions.create(
        messages=messages, stream=True, **common
    ) as parts:
        chat_stream = list(parts)
    seeded = client.completions.create(
        prompt=PROMPT, **{**common, "temperature": 0.8}, seed=3, logprobs=2
    )
    return {
        "completion": completion.choices[0].text,
        "stream": "".join(part.choices[0].text for part in streamed),
        "chat": chat.choices[0].message.content,
        "chat stream": "".join(
            part.choices[0].delta.content or "" for part in chat_stream if part.choices
        ),
        "seeded": seeded.choices[0].text,
        "usage": completion.usage.completion_tokens,
    }


def test_a_server_with_trees_answers_as_one_without(tmp_path: Path):
    with serving(None, tmp_path / "plain.log") as port, connect(port) as client:
        plain = ask_everything(client)
    log = tmp_path / "tree.log"
    with serving(TREE, log, num_api_servers=2) as port, connect(port) as client:
        trees = ask_everything(client)
        metrics = Scrape(port)
        obey_a_choice(client)
        later = Scrape(port)
    assert trees == plain
    assert trees["stream"] == trees["completion"]
    assert trees["chat stream"] == trees["chat"]
    assert metrics("spec_decode_num_accepted_tokens_total") > 0
    # Two processes show what one engine did.
    ahead = metrics("treespec_tree_size_count") - metrics(
        "spec_decode_num_drafts_total"
    )
    assert 0 <= ahead <= NUM_ASKED
    assert metrics("treespec_fallbacks_total") == 0
    assert later("treespec_fallbacks_total") == 0
    for proposer in ("draft_model", "suffix", "ngram"):
        assert later("treespec_draft_seconds_total", proposer=proposer) > 0


def obey_a_choice(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=8,
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert answer.choices[0].text in ("yes", "no")


class Scrape:
    """What ``/metrics`` says, asked by name and, if need be, labels."""

    def __init__(self, port: int) -> None:
        with urlopen(f"http://127.0.0.1:{port}/metrics") as response:
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
            assert sample.labels["model_name"] == "tiny"
            assert sample.labels["engine"] == "0"
        return float(sum(sample.value for sample in found))


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        (
            {"method": "treespec", "tree": {"proposers": [{"type": "sufix"}]}},
            "did you mean 'suffix'",
        ),
        (
            {"method": "treespec", "num_speculative_tokens": 5000},
            "num_speculative_tokens=5000: must be in [1, 1024]",
        ),
    ],
)
def test_a_wrong_flag_ends_the_server_with_one_clear_error(
    speculative: dict[str, Any], message: str
):
    result = subprocess.run(
        command(speculative, free_port()),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Loading safetensors" not in result.stdout + result.stderr
