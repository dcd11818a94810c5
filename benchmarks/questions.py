"""A fixed sample of Spec-Bench's questions (benchmarks/spec_bench)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "spec_bench/question.jsonl"
CATEGORIES = (
    "mt_bench",
    "translation",
    "summarization",
    "qa",
    "math_reasoning",
    "rag",
)


class Question(NamedTuple):
    category: str
    text: str


def sample(per_category: int) -> list[Question]:
    """So many questions of each category, spread over it, categories taking turns."""
    found: dict[str, list[Question]] = {category: [] for category in CATEGORIES}
    for line in FILE.read_text().splitlines():
        question = json.loads(line)
        # MT-bench's own eight categories are one here.
        category = question["category"]
        category = category if category in found else "mt_bench"
        found[category].append(Question(category, question["turns"][0]))
    return [
        questions[number * len(questions) // per_category]
        for number in range(per_category)
        for questions in found.values()
    ]
