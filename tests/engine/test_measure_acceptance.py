"""The measured ranks are those of the models themselves."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vllm_treespec.config import ConfigError
from vllm_treespec.integration import measure_acceptance as module
from vllm_treespec.integration.measure_acceptance import (
    Measured,
    MeasureOptions,
    measure_acceptance,
)

MODELS = Path(__file__).parents[2] / "models/python-stdlib"
TEXT = "\n".join(Path(textwrap.__file__).read_text().splitlines()[5:25])
PROMPT_TOKENS, MAX_TOKENS, NUM_RANKS = 23, 16, 5


def options(data: Path, **changes: Any) -> MeasureOptions:
    defaults: dict[str, Any] = {
        "target": str(MODELS / "target"),
        "draft": str(MODELS / "draft"),
        "data": str(data),
        "num_prompts": 100,
        "max_tokens": MAX_TOKENS,
        "prompt_tokens": PROMPT_TOKENS,
        "num_ranks": NUM_RANKS,
        "dtype": "float32",
        "engine": {
            "kv_cache_memory_bytes": 2**24,
            "distributed_executor_backend": "uni",
        },
    }
    return MeasureOptions(**{**defaults, **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def greedy(text: Path) -> Measured:
    return measure_acceptance(options(text))


def load(name: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        MODELS / name, dtype=torch.float32
    )
    return model.eval()


@torch.inference_mode()
def ranks_by_transformers() -> list[int]:
    """Rank, from 0, of every greedy token of the target under the draft."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / "target")
    token_ids = torch.tensor(tokenizer.encode(TEXT, verbose=False))
    num_prompts = len(token_ids) // PROMPT_TOKENS
    prompts = token_ids[: num_prompts * PROMPT_TOKENS].view(num_prompts, -1)
    target, draft = load("target"), load("draft")
    ranks = []
    for prompt in prompts:
        tokens = prompt
        for _ in range(MAX_TOKENS):
            tokens = torch.cat([tokens, target(tokens[None]).logits[0, -1:].argmax(-1)])
            if tokens[-1] == target.config.eos_token_id:
                break
        logits = draft(tokens[None]).logits[0]
        for position in range(len(prompt), len(tokens)):
            before = logits[position - 1]
            ranks.append(int((before > before[tokens[position]]).sum()))
    return ranks


def test_ranks_are_those_that_transformers_computes(greedy):
    ranks = ranks_by_transformers()
    assert greedy.num_positions == len(ranks) > 100
    counts = [ranks.count(rank) for rank in range(NUM_RANKS)]
    assert [round(rate * greedy.num_positions) for rate in greedy.acceptance] == counts
    assert len(set(counts)) > 2, "the text is too easy to tell ranks apart"


def test_sampled_tokens_are_harder_to_guess(text, greedy):
    sampled = measure_acceptance(options(text, temperature=1.0))
    assert 0 < sampled.acceptance[0] < greedy.acceptance[0]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Prompts that the target was asked to continue, by measurements without one."""
    prompts: list[list[int]] = []

    def continue_(_options: Any, given: Any, _engine: Any) -> list[list[int]]:
        prompts[:] = given
        return [[0]] * len(given)

    monkeypatch.setattr(module, "_continue", continue_)
    monkeypatch.setattr(module, "_ranks", lambda _o, given, *_: [1] * len(given))
    return prompts


def test_prompts_may_be_lines_of_json(tmp_path, asked):
    path = tmp_path / "prompts.jsonl"
    texts = ["import os\n", "def f(x):\n    return '\u2028'"]
    lines = [json.dumps({"prompt": t, "id": 7}, ensure_ascii=False) for t in texts]
    path.write_text("\n\n".join(lines), "utf-8")
    measured = measure_acceptance(options(path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / "target")
    assert asked == [tokenizer.encode(text) for text in texts]
    assert measured.acceptance == (0.0, 1.0, 0.0, 0.0, 0.0)


def test_the_seed_decides_which_prompts_are_drawn(text, asked):
    drawn = []
    for seed in (0, 0, 1, 2):
        measure_acceptance(options(text, num_prompts=4, seed=seed))
        drawn.append(list(asked))
    assert drawn[0] == drawn[1] != drawn[2] != drawn[3]
    assert [len(prompt) for prompt in drawn[0]] == [PROMPT_TOKENS] * 4


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("empty.txt", " \n", r"empty\.txt': is empty"),
        ("short.txt", "import os", r"short\.txt': has \d+ tokens, a prompt has .*=23"),
        ("broken.jsonl", '{"prompt": "a"}\n{', r"broken\.jsonl:2: not JSON"),
        ("other.jsonl", '{"text": "a"}', r"other\.jsonl:1: must be an object with"),
        ("none.jsonl", '{"prompt": ""}', r"none\.jsonl:1: must be an object with"),
    ],
)
def test_data_that_will_not_do_is_refused_by_name(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=problem):
        measure_acceptance(options(tmp_path / name))


def test_missing_data_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.txt': cannot be read .*No such file"):
        measure_acceptance(options(tmp_path / "no.txt"))


def test_a_draft_with_other_tokens_is_refused(text, model_path):
    with pytest.raises(ConfigError, match=r"has 97 tokens, the target .* has 2048"):
        measure_acceptance(options(text, draft=model_path("llama")))


def test_more_ranks_than_tokens_are_refused(text):
    with pytest.raises(ConfigError, match="num_ranks=2049: the models have 2048"):
        measure_acceptance(options(text, num_ranks=2049))


def test_continuations_that_do_not_fit_are_refused(text):
    with pytest.raises(ConfigError, match=r"takes 2049 positions, the target has 2048"):
        measure_acceptance(options(text, max_tokens=2025))
    with pytest.raises(ConfigError, match=r"takes 40 positions.*raise max_model_len"):
        measure_acceptance(options(text, max_model_len=39))
