"""A minute of ``make soak``, and that its checks notice what they are there for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_treespec.testing.soak import Record
from vllm_treespec.testing.soak_report import growth, problems
from vllm_treespec.testing.soak_requests import (
    KINDS,
    Answer,
    Choice,
    Request,
    fault,
    fault_of_part,
    loss,
    make_requests,
)

SOAK = Path(__file__).parents[2] / "tools/soak.py"


def test_a_minute_of_everything_loses_nothing():
    words = ["--seconds", "60", "--requests", "54"]
    result = subprocess.run(
        [sys.executable, str(SOAK), *words], capture_output=True, text=True
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]


def request(kind: str, **options: object) -> Request:
    options = {**KINDS[kind].options, "max_tokens": 8, **options}
    return Request(kind=kind, is_chat=False, prompt="def", options=options)


def answer(text: str, finish_reason: str = "length", num_tokens: int = 8) -> Answer:
    return Answer({0: Choice(text, finish_reason)}, num_tokens=num_tokens)


def test_one_other_letter_is_wrong():
    asked = request("greedy")
    assert fault(asked, answer("a + b"), answer("a + b")) is None
    assert "a + c" in str(fault(asked, answer("a + c"), answer("a + b")))


def test_an_other_end_is_wrong():
    wanted = answer("a + b")
    assert fault(request("greedy"), answer("a + b", "stop"), wanted)
    assert fault(request("greedy"), answer("a + b", num_tokens=7), wanted)


def test_other_logprobs_are_wrong():
    pair = [answer("a"), answer("a")]
    for each, log_prob in zip(pair, (-1.0, -1.1), strict=True):
        each.choices[0].logprobs = [("a", log_prob)]
    assert fault(request("greedy, logprobs"), *pair)


@pytest.mark.parametrize(
    ("text", "finish_reason", "obeys"),
    [
        ('{"verb":"pop","sizes":[0,31],"flag":true}', "stop", True),
        ('{"verb":"pop","sizes":[0],"flag":true}', "stop", False),
        ('{"verb":"pop","sizes":[0,31]', "stop", False),
        ('{"verb":"pop","sizes":[0,3', "length", True),
        ('{"verb":"put', "length", False),
    ],
)
def test_an_answer_obeys_its_schema(text: str, finish_reason: str, obeys: bool):
    found = fault(request("sampled, JSON"), answer(text, finish_reason), None)
    assert (found is None) == obeys


def test_a_choice_that_is_missing_or_does_not_end_is_lost():
    assert loss(request("sampled"), answer("a")) is None
    assert loss(request("sampled", n=2), answer("a"))
    unfinished = answer("a")
    unfinished.choices[0].finish_reason = None
    assert loss(request("sampled"), unfinished)


def test_an_aborted_answer_must_begin_as_the_whole_one():
    assert fault_of_part(answer("a +"), answer("a + b")) is None
    assert fault_of_part(answer("a -"), answer("a + b"))


def test_every_kind_is_asked_and_always_the_same():
    asked = make_requests(54, seed=0)
    assert {each.kind for each in asked} == KINDS.keys() - {"unique text"}
    again = make_requests(54, seed=0)
    assert [each.body for each in asked] == [each.body for each in again]
    assert [each.body for each in asked] != [
        each.body for each in make_requests(54, seed=1)
    ]


def test_growth_ignores_the_warm_up():
    warm_up = [(float(second), 100.0 + 10 * second) for second in range(40)]
    steady = [(float(second), 500.0 + second / 60) for second in range(40, 101)]
    slope, error = growth(warm_up + steady)
    assert slope == pytest.approx(1.0)
    assert error == pytest.approx(0.0, abs=1e-6)


SERIES = {
    "num_preemptions_total": 2.0,
    "spec_decode_num_accepted_tokens_total": 9.0,
    "treespec_fallbacks_total": 0.0,
}


def quiet_record() -> Record:
    seconds = [float(second) for second in range(601)]
    return Record(
        num_prompt_tokens=1900,
        num_tokens=200,
        seconds=600.0,
        memory_mb=[(second, 500.0) for second in seconds],
    )


def test_a_soak_in_which_nothing_was_wrong_has_no_problems():
    assert not list(problems(quiet_record(), SERIES.__getitem__, 1024))


@pytest.mark.parametrize("series", SERIES)
def test_a_soak_that_did_not_try_is_a_problem(series: str):
    counts = {**SERIES, series: float(not SERIES[series])}
    assert len(list(problems(quiet_record(), counts.__getitem__, 1024))) == 1


def test_a_cache_that_was_not_filled_is_a_problem():
    assert len(list(problems(quiet_record(), SERIES.__getitem__, 2048))) == 1


def test_wrong_and_lost_answers_and_growth_are_problems():
    record = quiet_record()
    record.tallies["greedy"].wrong.append("a")
    record.tallies["seeded"].lost.append("b")
    record.memory_mb = [(second, mb + second) for second, mb in record.memory_mb]
    found = list(problems(record, SERIES.__getitem__, 1024))
    assert found[:2] == ["wrong: a", "lost: b"]
    assert found[2].startswith("memory grew by 60.0 +- 0.0 MB/min")
