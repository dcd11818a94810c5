from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from vllm_treespec.core.propose import Candidates, DecodeStep
from vllm_treespec.core.propose.pool import ProposerPool


class Echo:
    """Drafts one token per row, or whatever the test says."""

    name = "echo"

    def __init__(self, token=1, parent=-1):
        self.token, self.parent = token, parent
        self.learned = threading.Event()
        self.may_learn = threading.Event()
        self.may_learn.set()
        self.calls: list[str] = []

    def add_request(self, slot):
        self.calls.append("add")

    def remove_request(self, slot):
        self.calls.append("remove")

    def clear(self):
        self.calls.append("clear")

    def propose(self, step):
        rows = len(step.slots)
        return Candidates(
            token_ids=np.full((rows, 1), self.token, np.int32),
            parents=np.full((rows, 1), self.parent, np.int32),
            scores=np.zeros((rows, 1), np.float32),
            num_candidates=np.ones(rows, np.int32),
        )

    def learn(self, step):
        assert self.may_learn.wait(10)
        self.calls.append("learn")


def step(rows=2):
    return DecodeStep(
        slots=np.arange(rows, dtype=np.int32),
        token_ids=np.zeros((4, 8), np.int32),
        num_tokens=np.ones(4, np.int64),
    )


def pool(*proposers, max_candidates=4, timeout=10.0):
    return ProposerPool(
        proposers, max_candidates=max_candidates, vocab_size=10, timeout=timeout
    )


def test_every_proposer_is_asked():
    first, second = pool(Echo(1), Echo(2)).propose(step())
    assert first.token_ids.tolist() == [[1], [1]]
    assert second.token_ids.tolist() == [[2], [2]]


@pytest.mark.parametrize(
    "nonsense",
    [Echo(token=10), Echo(token=-1), Echo(parent=0), Echo(parent=-2)],
    ids=["beyond vocabulary", "negative token", "own parent", "parent below the root"],
)
def test_nonsense_dismisses_its_proposer_only(nonsense):
    asked = pool(nonsense, Echo(2))
    bad, good = asked.propose(step())
    assert bad.num_candidates.tolist() == [0, 0]
    assert good.num_candidates.tolist() == [1, 1]
    nonsense.token, nonsense.parent = 1, -1
    assert asked.propose(step())[0].num_candidates.tolist() == [0, 0]


class Scored(Echo):
    """The last row is a chain with these scores, and stale columns behind it."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = scores

    def propose(self, step):
        rows, size = len(step.slots), len(self.scores)
        candidates = Candidates.allocate(rows, size + 2)
        candidates.parents[-1] = [*range(-1, size - 1), 99, -99]
        candidates.scores[-1] = [*self.scores, np.nan, 7.0]
        candidates.num_candidates[-1] = size
        return candidates


@pytest.mark.parametrize(
    "scores", [(0.5,), (np.nan,), (-1.0, -0.9), (-1.0, np.nan), (-np.inf, -3.0)]
)
def test_scores_that_no_path_can_have_are_nonsense(scores):
    asked = pool(Scored(*scores), max_candidates=9)
    assert asked.propose(step())[0].num_candidates.sum() == 0


@pytest.mark.parametrize(
    "scores", [(0.0, -0.0), (-1.0, -1.0), (-2.0, -np.inf, -np.inf), (-np.inf,)]
)
def test_scores_that_fall_along_the_path_are_fine(scores):
    kept = pool(Scored(*scores), max_candidates=9).propose(step())[0]
    assert kept.num_candidates.tolist() == [0, len(scores)]


def test_scores_are_held_against_the_parent_and_not_against_the_neighbour():
    siblings = Scored(-3.0, -1.0, -2.0)
    propose = siblings.propose

    def as_siblings(step):
        candidates = propose(step)
        candidates.parents[-1, :3] = [-1, -1, 1]
        return candidates

    siblings.propose = as_siblings
    kept = pool(siblings, max_candidates=9).propose(step())[0]
    assert kept.num_candidates.sum() == 3


def test_more_candidates_than_asked_for_are_nonsense():
    assert pool(Echo(), max_candidates=0).propose(step())[0].num_candidates.sum() == 0


@pytest.mark.parametrize(
    "method", ["add_request", "remove_request", "propose", "learn"]
)
def test_a_failure_anywhere_is_survived(method, monkeypatch):
    failing = Echo()

    def fail(*_):
        raise MemoryError("no room for ideas")

    monkeypatch.setattr(failing, method, fail)
    survivor = Echo(3)
    asked = pool(failing, survivor)
    asked.add_request(0)
    asked.propose(step())
    asked.learn(step())
    asked.remove_request(0)
    bad, good = asked.propose(step())
    assert bad.num_candidates.sum() == 0
    assert good.num_candidates.sum() == 2
    assert survivor.calls == ["add", "learn", "remove"]


def test_learning_happens_elsewhere_and_everything_else_waits_for_it():
    proposer = Echo()
    proposer.may_learn.clear()
    asked = pool(proposer)
    asked.learn(step())  # returns although the proposer has not begun
    assert proposer.calls == []
    threading.Timer(0.05, proposer.may_learn.set).start()
    asked.settle()
    assert proposer.calls == ["learn"]
    asked.add_request(1)
    assert proposer.calls == ["learn", "add"]
    asked.shutdown()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_candidates", np.array([2, 1], np.int32)),  # one column
        ("num_candidates", np.array([-1, 1], np.int32)),
        ("num_candidates", np.ones(3, np.int32)),
        ("parents", np.full((2, 2), -1, np.int32)),
        ("scores", np.zeros((1, 1), np.float32)),
        ("scores", np.zeros((2, 1), np.float64)),
        ("token_ids", np.ones((2, 1), np.int64)),
        ("token_ids", np.ones((2, 2), np.int32)[:, ::2]),  # no row follows the last
    ],
)
def test_arrays_that_do_not_fit_are_nonsense(field, value):
    class Misfit(Echo):
        def propose(self, step):
            return replace(super().propose(step), **{field: value})

    assert pool(Misfit()).propose(step())[0].num_candidates.tolist() == [0, 0]


@pytest.mark.parametrize("method", ["propose", "learn", "add_request"])
def test_who_stalls_is_left_behind(method, caplog, monkeypatch):
    stalled, goes_on = Echo(), threading.Event()
    monkeypatch.setattr(stalled, method, lambda _: goes_on.wait(60))
    asked = pool(stalled, Echo(3), timeout=0.2)
    start = time.monotonic()
    asked.add_request(0)
    asked.propose(step())
    asked.learn(step())
    bad, good = asked.propose(step())
    assert bad.num_candidates.sum() == 0
    assert good.num_candidates.sum() == 2
    assert time.monotonic() - start < 10
    assert asked.is_dismissed == [True, False]
    assert caplog.text.count("is off until restart") == 1
    assert "no answer within 0.2 s" in caplog.text
    goes_on.set()  # its thread ends, and nobody looks at the result


def test_slow_proposers_work_side_by_side():
    both = threading.Barrier(2, timeout=10)

    class Meets(Echo):
        def propose(self, step):
            both.wait()
            return super().propose(step)

    first, second = pool(Meets(), Meets()).propose(step())
    assert first.num_candidates.sum() == second.num_candidates.sum() == 2
