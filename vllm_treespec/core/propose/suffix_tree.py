"""Grow a draft tree from the suffix index, likeliest path first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_treespec.core.propose.native import native
from vllm_treespec.core.propose.suffix_index import (
    COUNT_BITS,
    HITS,
    IS_LOCAL,
    MAX_COUNT,
    MAX_ORDER,
    MAX_SEEN,
    NUM_FOLLOWERS,
    NUM_LEVELS,
    ORDERS,
    SEEN_BITS,
    TRIALS,
    bucket_of,
    extend_hashes,
    find,
    hash_history,
    key_of,
    read_followers,
    total_count,
)

LOOKUPS_PER_NODE = 3  # typical text needs 2; the bound is for text without structure
MIN_LOOKUPS = 32
# An unasked level is worth at most what better levels withheld, typically much less.
# Asking late saves a quarter of the lookups, for less than 1% of the accepted tokens.
OPTIMISM = np.float32(0.3)
MIN_CONFIDENCE = np.float32(0.5)  # of a new node, in line for its first question
MAX_MASS = np.float32(0.999)  # of all followers of a context

# Columns of ``nodes``. Node 0 is the root, the newest committed token.
DEPTH = 0
LEVEL = 1  # the next one to ask
NUM_SEEN = 2  # tokens offered so far
LONGEST = 3  # bound on the match's length: global, then local
NUM_COLUMNS = 5
PATH_PROB, WITHHELD = 0, 1  # columns of ``probs``; withheld: not handed out yet
NODE, TOKEN = 0, 1  # columns of ``offers``
HEAP, OFFERS, LOOKUPS = 0, 1, 2  # places in ``sizes``


@native
def _push(
    scores: npt.NDArray[np.float32],
    items: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    score: np.float32,
    item: int,
) -> None:
    child = sizes[HEAP]
    sizes[HEAP] += 1
    while child > 0:
        parent = (child - 1) >> 1
        if scores[parent] >= score:
            break
        scores[child], items[child] = scores[parent], items[parent]
        child = parent
    scores[child], items[child] = score, item


@native
def _drop_top(
    scores: npt.NDArray[np.float32],
    items: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
) -> None:
    sizes[HEAP] -= 1
    size = sizes[HEAP]
    score, item = scores[size], items[size]
    parent = 0
    while 2 * parent + 1 < size:
        child = 2 * parent + 1
        if child + 1 < size and scores[child + 1] > scores[child]:
            child += 1
        if scores[child] <= score:
            break
        scores[parent], items[parent] = scores[child], items[child]
        parent = child
    scores[parent], items[parent] = score, item


@native
def _next_entry(
    entries: npt.NDArray[np.uint32],
    clock: int,
    window: int,
    salt: np.uint64,
    namespace: np.uint64,
    num_tokens: int,
    nodes: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.int64],
    max_lookups: int,
    node: int,
) -> int:
    """The entry of the best level left that knows the node's context, or -1.

    A child's match is at most one token longer than its parent's, so longer contexts
    need no lookup: 40% fewer.
    """
    while nodes[node, LEVEL] < NUM_LEVELS and sizes[LOOKUPS] < max_lookups:
        level = nodes[node, LEVEL]
        order, longest = ORDERS[level], LONGEST + IS_LOCAL[level]
        nodes[node, LEVEL] += 1
        if order > num_tokens + nodes[node, DEPTH] or order > nodes[node, longest]:
            continue
        sizes[LOOKUPS] += 1
        key = key_of(hashes[node, order], level, salt, namespace)
        entry = find(entries, clock, window, key)
        if entry >= 0:
            return entry
        nodes[node, longest] = order - 1
    return -1


@native
def _add_node(
    nodes: npt.NDArray[np.int64],
    probs: npt.NDArray[np.float32],
    hashes: npt.NDArray[np.uint64],
    parent: int,
    node: int,
    token: int,
    path_prob: np.float32,
) -> None:
    extend_hashes(hashes, parent, node, token)
    nodes[node, DEPTH] = nodes[parent, DEPTH] + 1
    nodes[node, LEVEL] = 0
    nodes[node, NUM_SEEN] = 0
    nodes[node, LONGEST] = nodes[parent, LONGEST] + 1
    nodes[node, LONGEST + 1] = nodes[parent, LONGEST + 1] + 1
    probs[node, PATH_PROB] = path_prob
    probs[node, WITHHELD] = np.float32(1)


@native
def _rate(
    calibration: npt.NDArray[np.float32],
    level: int,
    seen: npt.NDArray[np.int64],
    node: int,
    first: int,
    end: int,
    shares: npt.NDArray[np.float32],
    first_offer: int,
) -> np.float32:
    """Write how often followers like these came true; return the sum."""
    total = total_count(seen, node, first, end)
    mass = np.float32(0)
    for place in range(first, end):
        count = seen[node, place] & MAX_COUNT
        newest = seen[node, place] >> COUNT_BITS & 1
        row, column = bucket_of(count), bucket_of(total - count)
        share = (
            calibration[level, row, column, newest, HITS]
            / calibration[level, row, column, newest, TRIALS]
        )
        shares[first_offer + place - first] = share
        mass += share
    return mass


@native
def grow_tree(
    entries: npt.NDArray[np.uint32],
    calibration: npt.NDArray[np.float32],
    clock: int,
    window: int,
    salt: np.uint64,
    namespace: np.uint64,
    history: npt.NDArray[np.int32],
    num_tokens: int,
    min_prob: np.float32,
    max_depth: int,
    token_ids: npt.NDArray[np.int32],
    parents: npt.NDArray[np.int32],
    path_scores: npt.NDArray[np.float32],
) -> int:
    """Fill one row of candidates and return how many there are.

    The heap holds offers (children not yet taken, item >= 0) and questions (nodes
    whose next level was not asked yet, item = -1 - node).
    """
    max_nodes = token_ids.shape[0]
    max_lookups = max(LOOKUPS_PER_NODE * max_nodes, MIN_LOOKUPS)
    max_offers = max_lookups * NUM_FOLLOWERS
    nodes = np.empty((max_nodes + 1, NUM_COLUMNS), np.int64)
    probs = np.empty((max_nodes + 1, 2), np.float32)
    hashes = np.empty((max_nodes + 1, MAX_ORDER + 1), np.uint64)
    seen = np.empty((max_nodes + 1, MAX_SEEN), np.int64)
    offers = np.empty((max_offers, 2), np.int64)
    shares = np.empty(max_offers, np.float32)  # of each offer, given its parent
    scores = np.empty(max_offers + max_nodes + 1, np.float32)
    items = np.empty(max_offers + max_nodes + 1, np.int64)
    sizes = np.zeros(3, np.int64)

    hash_history(hashes, history, num_tokens)
    nodes[0, :] = 0
    nodes[0, LONGEST:] = MAX_ORDER
    probs[0, :] = np.float32(1)
    _push(scores, items, sizes, np.float32(1), -1)
    num_taken = 0
    while sizes[HEAP] > 0 and num_taken < max_nodes:
        score, item = scores[0], items[0]
        _drop_top(scores, items, sizes)
        if item >= 0:
            parent = offers[item, NODE]
            token_ids[num_taken] = offers[item, TOKEN]
            parents[num_taken] = parent - 1
            path_scores[num_taken] = np.log(score)
            num_taken += 1
            if nodes[parent, DEPTH] + 1 < max_depth:
                token = offers[item, TOKEN]
                _add_node(nodes, probs, hashes, parent, num_taken, token, score)
                confidence = max(shares[item], MIN_CONFIDENCE)
                _push(scores, items, sizes, score * confidence, -1 - num_taken)
            continue
        node = -1 - item
        entry = _next_entry(
            entries,
            clock,
            window,
            salt,
            namespace,
            num_tokens,
            nodes,
            hashes,
            sizes,
            max_lookups,
            node,
        )
        if entry < 0:
            continue
        first = nodes[node, NUM_SEEN]
        end = read_followers(entries, entry, seen, node, first)
        nodes[node, NUM_SEEN] = end
        level = nodes[node, LEVEL] - 1
        first_offer = sizes[OFFERS]
        sizes[OFFERS] += end - first
        mass = _rate(calibration, level, seen, node, first, end, shares, first_offer)
        withheld = probs[node, WITHHELD]
        probs[node, WITHHELD] *= np.float32(1) - min(mass, MAX_MASS)
        withheld *= MAX_MASS / max(mass, MAX_MASS)
        for place in range(first, end):
            offer = first_offer + place - first
            offers[offer, NODE] = node
            offers[offer, TOKEN] = seen[node, place] >> SEEN_BITS
            shares[offer] *= withheld
            score = shares[offer] * probs[node, PATH_PROB]
            if score >= min_prob:
                _push(scores, items, sizes, score, offer)
        rest = probs[node, WITHHELD] * probs[node, PATH_PROB]
        if rest >= min_prob:
            _push(scores, items, sizes, rest * OPTIMISM, item)
    return num_taken


@native
def grow_trees(
    entries: npt.NDArray[np.uint32],
    calibration: npt.NDArray[np.float32],
    clock: npt.NDArray[np.int64],
    window: int,
    salts: npt.NDArray[np.uint64],
    namespaces: npt.NDArray[np.uint64],
    slots: npt.NDArray[np.int32],
    token_ids: npt.NDArray[np.int32],
    num_tokens: npt.NDArray[np.int64],
    min_prob: np.float32,
    max_depth: int,
    out_token_ids: npt.NDArray[np.int32],
    out_parents: npt.NDArray[np.int32],
    out_scores: npt.NDArray[np.float32],
    out_num_candidates: npt.NDArray[np.int32],
) -> None:
    for row in range(slots.shape[0]):
        slot = slots[row]
        out_num_candidates[row] = grow_tree(
            entries,
            calibration,
            clock[0],
            window,
            salts[slot],
            namespaces[slot],
            token_ids[slot],
            num_tokens[slot],
            min_prob,
            max_depth,
            out_token_ids[row],
            out_parents[row],
            out_scores[row],
        )
