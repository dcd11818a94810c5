"""``vllm serve`` with the flag, in processes of its own, asked over HTTP."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest

from tests.engine.servers import PROMPT, TARGET, TREE, connect
from vllm_treespec.testing.servers import (
    Scrape,
    Server,
    command,
    environment,
    free_port,
    serving,
)

NUM_ASKED = 5  # requests of ``ask_everything``


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
    log = tmp_path / "plain.log"
    with serving(TARGET, None, log) as server, connect(server) as client:
        plain = ask_everything(client)
    log = tmp_path / "tree.log"
    two = ("--api-server-count", "2")
    with serving(TARGET, TREE, log, *two) as server, connect(server) as client:
        trees = ask_everything(client)
        metrics = Scrape(server)
        obey_a_choice(client)
        refuse_what_cannot_be_had(client)
        without = complete(client, treespec_max_nodes=0)
        later = Scrape(server)
        forget(server)
        assert complete(client, treespec_proposers=["suffix"]) == without
        cleared = Scrape(server)
    assert trees == plain
    assert without == plain["completion"]
    reason = "treespec_steps_without_drafts_total"
    assert later(reason, reason="not_wanted") >= 31
    known = "treespec_suffix_cached_tokens"
    assert 0 < cleared(known) < 80 < later(known)
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


def test_a_server_with_a_key_forgets_at_once_and_finishes_what_runs(tmp_path: Path):
    """``--api-key`` guards our endpoint as well, and SIGTERM under load ends no request
    while ``--shutdown-timeout`` lasts."""
    log = tmp_path / "server.log"
    suffix = {"method": "treespec", "num_speculative_tokens": 8}
    options = ("--api-key", "none", "--shutdown-timeout", "120")
    known = "treespec_suffix_cached_tokens"
    with serving(TARGET, suffix, log, *options) as server, connect(server) as client:
        complete(client)
        assert Scrape(server)(known) > 0
        with pytest.raises(HTTPError, match="401"):
            forget(server)
        assert Scrape(server)(known) > 0
        forget(server, Authorization="Bearer none")
        assert Scrape(server)(known) == 0
        with client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=150,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        ) as parts:
            next(iter(parts))
            server.process.terminate()
            *_, last = parts
        assert last.usage.completion_tokens == 150
        assert server.process.wait(120) == 0
    text = log.read_text()
    assert "treespec: trees of 8 draft nodes per request and step, from suffix" in text
    assert "endpoint plugin" not in text


def complete(client: openai.OpenAI, **options: Any) -> str:
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=32,
        temperature=0.0,
        extra_body={"vllm_xargs": options},
    )
    return answer.choices[0].text


def refuse_what_cannot_be_had(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, treespec_max_nodes=9)
    assert "treespec_max_nodes=9: must be in [0, 8]" in str(error.value)
    with pytest.raises(openai.BadRequestError, match="did you mean 'suffix'"):
        complete(client, treespec_proposers=["sufix"])


def forget(server: Server, **headers: str) -> None:
    request = Request(f"{server.url}/treespec/clear", headers=headers, method="POST")
    with urlopen(request) as response:
        assert response.status == 200


def obey_a_choice(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=8,
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert answer.choices[0].text in ("yes", "no")


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
        command(TARGET, speculative, free_port()),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Loading safetensors" not in result.stdout + result.stderr
