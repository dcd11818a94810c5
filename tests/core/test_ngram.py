"""Prompt lookup sees one request at a time and merges what it finds there."""

import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from vllm_treespec.core.propose import Candidates, DecodeStep
from vllm_treespec.core.propose.ngram import NgramProposer


@pytest.fixture
def make():
    def build(**options: int | float) -> NgramProposer:
        return NgramProposer(**{"max_nodes": 32, **options})

    return build


def step_of(*histories) -> DecodeStep:
    """Row r is slot ``len(histories) - r``; slot 0 holds junk."""
    num_slots = len(histories) + 1
    longest = max((len(history) for history in histories), default=0)
    token_ids = np.full((num_slots, longest + 5), 999, np.int32)
    num_tokens = np.zeros(num_slots, np.int64)
    slots = np.arange(len(histories), 0, -1, dtype=np.int32)
    for slot, history in zip(slots, histories, strict=True):
        token_ids[slot, : len(history)] = history
        num_tokens[slot] = len(history)
    return DecodeStep(slots, token_ids, num_tokens)


def paths(candidates: Candidates, row: int = 0) -> dict[tuple[int, ...], float]:
    """Path from the root -> its last token's probability, given the ones before."""
    found: dict[tuple[int, ...], float] = {}
    spelled: list[tuple[int, ...]] = []
    for node in range(candidates.num_candidates[row]):
        parent = candidates.parents[row, node]
        prefix = spelled[parent] if parent >= 0 else ()
        spelled.append((*prefix, int(candidates.token_ids[row, node])))
        assert spelled[-1] not in found, "two siblings alike"
        score = candidates.scores[row, node]
        parent_score = candidates.scores[row, parent] if parent >= 0 else 0.0
        assert score <= parent_score, "a path above its start"
        found[spelled[-1]] = float(np.exp(score - parent_score))
    return found


def test_the_text_after_a_match_is_suggested_in_order(make):
    found = paths(make().propose(step_of([1, 2, 3, 4, 5, 1, 2])))
    assert (3, 4, 5) in found


def test_matches_are_merged_into_one_tree(make):
    found = paths(make().propose(step_of([1, 2, 7, 8, 1, 2, 7, 9, 1, 2])))
    assert {(7,), (7, 8), (7, 9)} <= found.keys()


def test_a_loaded_step_gets_the_best_of_the_same_tree(make):
    step = step_of([1, 2, 7, 8, 1, 2, 7, 9, 1, 2], [5, 6, 5])
    whole = make().propose(step)
    few = make().propose(replace(step, max_candidates=2))
    assert few.token_ids.shape == (2, 2) and whole.num_candidates[0] > 2
    assert few.token_ids[0].tolist() == whole.token_ids[0, :2].tolist()
    assert few.num_candidates[0] == 2
    more = make(max_nodes=3).propose(replace(step, max_candidates=50))
    assert more.token_ids.shape == (2, 3)


def test_more_matches_weigh_more(make):
    found = paths(make().propose(step_of([1, 2, 8, 1, 2, 8, 1, 2, 9, 1, 2])))
    assert found[8,] > found[9,]


def test_a_longer_match_outweighs_several_short_ones(make):
    found = paths(make().propose(step_of([1, 2, 3, 7, 3, 8, 3, 8, 1, 2, 3])))
    assert found[7,] > found[8,]


def test_a_match_shorter_than_min_n_is_ignored(make):
    history = [1, 2, 9, 2]
    assert not paths(make(min_n=2).propose(step_of(history)))
    assert (9,) in paths(make(min_n=1).propose(step_of(history)))


def test_a_match_that_overlaps_its_continuation_repeats(make):
    found = paths(make(max_nodes=7).propose(step_of([1, 2] * 5)))
    assert (1, 2, 1, 2, 1, 2, 1) in found


def test_no_request_sees_another_ones_text(make):
    candidates = make().propose(step_of([1, 2, 3, 4, 1, 2], [9, 8, 1, 2]))
    assert (3, 4) in paths(candidates, row=0)
    assert not paths(candidates, row=1)


def test_tokens_past_the_history_are_not_read(make):
    found = paths(make().propose(step_of([1, 2, 3, 1])))
    assert all(token != 999 for path in found for token in path)


@pytest.mark.parametrize("history", [[], [5], [5, 6, 7]])
def test_without_a_repetition_nothing_is_suggested(make, history):
    assert not paths(make().propose(step_of(history)))


def test_an_empty_batch_gives_an_empty_answer(make):
    assert make().propose(step_of()).token_ids.shape[0] == 0


@pytest.mark.parametrize("seed", range(12))
def test_trees_are_sound_on_any_text(make, seed):
    rng = np.random.default_rng(seed)
    max_nodes, max_depth = int(rng.integers(1, 70)), int(rng.integers(1, 9))
    history = rng.integers(0, int(rng.choice([1, 2, 5, 40])), 300)
    proposer = make(max_nodes=max_nodes, max_depth=max_depth)
    candidates = proposer.propose(step_of(history[: rng.integers(300)]))
    found = paths(candidates)
    mass: dict[tuple[int, ...], float] = defaultdict(float)
    for path, prob in found.items():
        assert 0.0 < prob <= 1.0
        assert len(path) <= max_depth
        assert set(path) <= set(history.tolist())
        mass[path[:-1]] += prob
    assert len(found) <= max_nodes
    assert all(total <= 1.0 + 1e-5 for total in mass.values())
    parents = candidates.parents[0, : len(found)]
    assert (parents < np.arange(len(found))).all()


def longest_matches(history: list[int], min_n: int, max_n: int) -> set[int]:
    """What followed the longest earlier occurrence of the newest tokens."""
    for length in range(max_n, min_n - 1, -1):
        newest = history[len(history) - length :]
        starts = range(len(history) - length)
        found = {
            history[start + length]
            for start in starts
            if history[start : start + length] == newest
        }
        if found:
            return found
    return set()


@pytest.mark.parametrize("seed", range(20))
def test_the_likeliest_token_follows_a_longest_match(make, seed):
    rng = np.random.default_rng(seed)
    history = rng.integers(0, 30, 80).tolist()
    found = paths(make(min_n=1, max_n=3, max_depth=1).propose(step_of(history)))
    expected = longest_matches(history, 1, 3)
    assert bool(found) == bool(expected)
    # Eight short matches can outweigh one that is a token longer; they are rare here.
    if expected:
        assert expected & {path[0] for path in found}


def test_a_long_history_takes_microseconds(make):
    rng = np.random.default_rng(0)
    proposer, step = make(), step_of(rng.integers(0, 50_000, 100_000))
    elapsed_s = []
    for _ in range(20):
        begin = time.perf_counter()
        proposer.propose(step)
        elapsed_s.append(time.perf_counter() - begin)
    assert min(elapsed_s) < 2e-3


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_nodes", 0), ("max_depth", 0), ("min_n", 0), ("min_log_prob", 0.5)],
)
def test_an_impossible_option_is_named(make, option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        make(**{option: value})
