"""benchmarks/questions.py: which of Spec-Bench's questions a benchmark asks."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

FILE = Path(__file__).parents[1] / "benchmarks/questions.py"
spec = importlib.util.spec_from_file_location("questions", FILE)
assert spec and spec.loader, "a file with a loader"
questions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(questions)


def test_all_categories_have_as_many_questions_and_none_comes_twice():
    asked = questions.sample(per_category=8)
    assert Counter(each.category for each in asked) == dict.fromkeys(
        questions.CATEGORIES, 8
    )
    assert len({each.text for each in asked}) == len(asked)


def test_the_whole_of_spec_bench_is_there():
    assert len(questions.sample(per_category=80)) == 480
