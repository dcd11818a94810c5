"""Prompt lookup: a request's own text, wherever it repeats itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_treespec.core.propose import Candidates, DecodeStep
from vllm_treespec.core.propose.native import frozen, native

MATCHES_PER_LENGTH = 8  # most recent ones of each match length
CHUNK = 64  # tokens compared at once, so that LLVM uses vector instructions
LENGTH_BASE = 1.5  # one more matching token makes a match this many times as credible
ESCAPE_WEIGHT = 3.0  # of no match at all, against 1 for a match of one token


class NgramProposer:
    """Suggests what followed earlier occurrences of the newest tokens.

    Reads the request's own history and keeps nothing between steps, so no request can
    see another one's text. Matches of ``max_n`` tokens down to ``min_n`` are merged
    into one tree; a continuation's share grows with the number of its matches and,
    exponentially, with their length. The matches are a partition of the tree's
    frontier: each one sits at the deepest drafted node that agrees with it.
    """

    name = "ngram"

    def __init__(
        self,
        *,
        max_nodes: int,
        max_depth: int = 64,
        min_n: int = 1,
        max_n: int = 8,
        min_log_prob: float = -9.0,
    ) -> None:
        """Compiles (or loads) the native code, so that no request waits for it."""
        if not 1 <= min_n <= max_n:
            raise ValueError(f"min_n={min_n}: must be in [1, max_n={max_n}]")
        if max_nodes < 1:
            raise ValueError(f"max_nodes={max_nodes}: must be at least 1")
        if max_depth < 1:
            raise ValueError(f"max_depth={max_depth}: must be at least 1")
        if min_log_prob > 0.0:
            raise ValueError(f"min_log_prob={min_log_prob}: must not be above 0")
        self.max_nodes = max_nodes
        self.max_depth = max_depth
        self.min_n = min_n
        self.max_n = max_n
        self.min_log_prob = min_log_prob
        self._warm_up()

    def add_request(self, slot: int) -> None:
        """Nothing to do: everything is in the history."""

    def remove_request(self, slot: int) -> None:
        """Nothing to do: nothing was kept."""

    def propose(self, step: DecodeStep) -> Candidates:
        candidates = Candidates.allocate(len(step.slots), step.width(self.max_nodes))
        _propose(
            frozen(step.slots),
            frozen(step.token_ids),
            frozen(step.num_tokens),
            self.min_n,
            self.max_n,
            self.max_depth,
            np.float32(np.exp(self.min_log_prob)),
            candidates.token_ids,
            candidates.parents,
            candidates.scores,
            candidates.num_candidates,
        )
        return candidates

    def learn(self, step: DecodeStep) -> None:
        """Nothing to do: the next history holds the tokens."""

    def clear(self) -> None:
        """Nothing to do: nothing was kept."""

    def _warm_up(self) -> None:
        step = DecodeStep(
            slots=np.zeros(1, np.int32),
            token_ids=np.ones((1, self.min_n + 2), np.int32),
            num_tokens=np.array([self.min_n + 1], np.int64),
        )
        assert self.propose(step).num_candidates[0] > 0, "one token repeats itself"


@native
def _propose(
    slots: npt.NDArray[np.int32],
    token_ids: npt.NDArray[np.int32],
    num_tokens: npt.NDArray[np.int64],
    min_n: int,
    max_n: int,
    max_depth: int,
    min_prob: np.float32,
    out_token_ids: npt.NDArray[np.int32],
    out_parents: npt.NDArray[np.int32],
    out_scores: npt.NDArray[np.float32],
    out_num: npt.NDArray[np.int32],
) -> None:
    places = np.empty(max_n * MATCHES_PER_LENGTH, np.int64)
    lengths = np.empty(max_n * MATCHES_PER_LENGTH, np.int64)
    for row in range(slots.shape[0]):
        history = token_ids[slots[row], : num_tokens[slots[row]]]
        num_matches = _find_matches(history, min_n, max_n, places, lengths)
        out_num[row] = _grow_tree(
            history,
            places[:num_matches],
            lengths[:num_matches],
            max_n,
            max_depth,
            min_prob,
            out_token_ids[row],
            out_parents[row],
            out_scores[row],
        )


@native
def _count_pairs(
    later: npt.NDArray[np.int32],
    newest: int,
    earlier: npt.NDArray[np.int32],  # as long as ``later``
    older: int,
) -> int:
    """Places where both agree. Only a loop this plain becomes vector instructions."""
    num_pairs = np.int32(0)
    for place in range(later.shape[0]):
        num_pairs += np.int32((later[place] == newest) & (earlier[place] == older))
    return int(num_pairs)


@native
def _match_length(history: npt.NDArray[np.int32], place: int, max_n: int) -> int:
    """How many tokens up to ``place`` agree with the newest ones."""
    last = history.shape[0] - 1
    length = 0
    while (
        length < max_n
        and length <= place
        and history[place - length] == history[last - length]
    ):
        length += 1
    return length


@native
def _find_matches(
    history: npt.NDArray[np.int32],
    min_n: int,
    max_n: int,
    places: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
) -> int:
    """Fill the token after each match and its length, newest first.

    Stops as soon as enough matches of the greatest length are found: older or shorter
    ones would hardly change the tree, and repetitive text stays as quick as any.
    """
    last = history.shape[0] - 1
    num_matches = 0
    num_of_length = np.zeros(max_n + 1, np.int64)
    reach = min_n - 1  # a match worth having agrees this far back
    end = last  # the last token matches itself
    while end > reach:
        start = max(reach, end - CHUNK)
        newest, older = history[last], history[last - reach]
        num_pairs = _count_pairs(
            history[start:end], newest, history[start - reach : end - reach], older
        )
        for place in range(end - 1, start - 1 if num_pairs else end - 1, -1):
            if history[place] != newest or history[place - reach] != older:
                continue
            length = _match_length(history, place, max_n)
            if length < min_n or num_of_length[length] == MATCHES_PER_LENGTH:
                continue
            num_of_length[length] += 1
            places[num_matches] = place + 1
            lengths[num_matches] = length
            num_matches += 1
            if num_of_length[max_n] == MATCHES_PER_LENGTH:
                return num_matches
        while num_of_length[reach + 1] == MATCHES_PER_LENGTH:
            reach += 1
        end = start
    return num_matches


@native
def _grow_tree(
    history: npt.NDArray[np.int32],
    places: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    max_n: int,
    max_depth: int,
    min_prob: np.float32,
    node_tokens: npt.NDArray[np.int32],
    node_parents: npt.NDArray[np.int32],
    node_scores: npt.NDArray[np.float32],
) -> int:
    """Take the likeliest continuation until the tree is full; return its size.

    An offer is a child not yet taken; ``offer_of`` says where each match sits.
    """
    num_tokens = history.shape[0]
    num_matches = places.shape[0]
    max_offers = num_matches * (max_depth + 1)
    offer_of = np.full(num_matches, -1, np.int64)
    offer_tokens = np.empty(max_offers, np.int32)
    offer_parents = np.empty(max_offers, np.int32)
    offer_depths = np.empty(max_offers, np.int64)
    offer_probs = np.empty(max_offers, np.float64)
    offer_scores = np.empty(max_offers, np.float64)
    open_offers = np.empty(num_matches + 1, np.int64)
    num_open = 0
    num_offers = 0
    num_nodes = 0
    taken, depth, score = -1, 0, 1.0
    while True:
        first_offer = num_offers
        total = ESCAPE_WEIGHT
        for match in range(num_matches if depth < max_depth else 0):
            if offer_of[match] != taken:
                continue
            # A match that overlaps its own continuation repeats with that period.
            place = places[match] + depth % (num_tokens - places[match])
            weight = LENGTH_BASE ** (min(lengths[match] + depth, 2 * max_n) - 1)
            total += weight
            offer = first_offer
            while offer < num_offers and offer_tokens[offer] != history[place]:
                offer += 1
            if offer == num_offers:
                offer_tokens[offer] = history[place]
                offer_parents[offer] = num_nodes - 1
                offer_depths[offer] = depth + 1
                offer_probs[offer] = 0.0
                num_offers += 1
            offer_probs[offer] += weight
            offer_of[match] = offer
        for offer in range(first_offer, num_offers):
            offer_probs[offer] /= total
            offer_scores[offer] = score * offer_probs[offer]
            open_offers[num_open] = offer
            num_open += 1
        best = -1
        for place in range(num_open):
            if best < 0 or (
                offer_scores[open_offers[place]] > offer_scores[open_offers[best]]
            ):
                best = place
        if best < 0 or num_nodes == node_tokens.shape[0]:
            return num_nodes
        taken = open_offers[best]
        depth, score = offer_depths[taken], offer_scores[taken]
        if score < min_prob:
            return num_nodes
        for place in range(best, num_open - 1):  # in order: equal scores, newest first
            open_offers[place] = open_offers[place + 1]
        num_open -= 1
        node_tokens[num_nodes] = offer_tokens[taken]
        node_parents[num_nodes] = offer_parents[taken]
        node_scores[num_nodes] = np.log(score)
        num_nodes += 1
