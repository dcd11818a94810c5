"""What followed which context: hashed counts with a bounded memory.

A *level* is one context length, in the request's own text (local) or in everybody's
(global); levels are ordered from the most to the least telling. At each level, a
context owns one entry of a hash table: its followers, most recent first, with counts.

The model is prediction by partial matching. The first level that knows the context
hands out part of the probability; what it withholds (the escape) goes to the next
level, which must not offer a token again. How much a level hands out to a follower is
not assumed but measured: ``hits / trials`` by level, follower's count, competitors'
count and recency, over text that requests wrote themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_treespec.core.propose.native import native, signed

# More orders did not predict better, and every one costs an entry per new context.
ORDERS = np.repeat((12, 6, 3, 2, 1), 2)  # [NUM_LEVELS], context length
IS_LOCAL = np.tile((1, 0), 5)  # [NUM_LEVELS]
DISCOUNTS = (0.1, 0.1, 0.25, 0.35, 0.45, 0.7, 0.55, 0.85, 0.8, 0.95)  # of a count
NUM_LEVELS = len(ORDERS)
MAX_ORDER = int(ORDERS.max())

NUM_FOLLOWERS = 6  # per context; the least frequent one gives way
TAG, STAMP, FOLLOWERS = 0, 1, 2  # words of an entry
MAX_SEEN = NUM_LEVELS * NUM_FOLLOWERS  # tokens that levels can offer together
NUM_WORDS = FOLLOWERS + NUM_FOLLOWERS  # half a cache line
NUM_WAYS = 4  # entries that a context may live in: two adjacent cache lines
ENTRIES_PER_TOKEN = 6  # Python source needs 4; random ids, 8, are forgotten earlier
BYTES_PER_TOKEN = ENTRIES_PER_TOKEN * NUM_WORDS * 4

COUNT_BITS = 8  # a follower is token << COUNT_BITS | count
MAX_COUNT = (1 << COUNT_BITS) - 1
MAX_TOKEN_ID = (1 << (32 - COUNT_BITS)) - 1
NEWEST = 1 << COUNT_BITS  # marks the most recent follower among those seen
SEEN_BITS = COUNT_BITS + 1

HITS, TRIALS = 0, 1
NUM_BUCKETS = 8  # counts 0, 1, 2, 3, 4-5, 6-9, 10-31, more
MAX_TRIALS = 4096.0  # then halve: what was measured long ago fades

TOKEN_MIX = np.uint64(0x9E3779B97F4A7C15)
ORDER_MIX = np.uint64(0xD1B54A32D192ED03)
FINAL_MIX = np.uint64(0xFF51AFD7ED558CCD)
ONE, HALF = np.uint64(1), np.uint64(32)


# Native functions take arrays, not tuples of arrays: Numba counts references to every
# array it takes out of a tuple, which tripled the time per tree.
@dataclass(frozen=True, slots=True)
class Index:
    """Counts and their calibration. A context untouched for ``window`` is forgotten."""

    entries: npt.NDArray[np.uint32]  # [num_entries, NUM_WORDS], tag 0: free
    calibration: npt.NDArray[np.float32]  # [NUM_LEVELS, count, rest, newest, HITS...]
    clock: npt.NDArray[np.int64]  # [1], tokens learned so far
    window: int

    @classmethod
    def allocate(cls, max_cached_tokens: int) -> Index:
        """Empty, ``BYTES_PER_TOKEN * max_cached_tokens`` bytes, rounded up."""
        num_sets = -(-max_cached_tokens * ENTRIES_PER_TOKEN // NUM_WAYS)
        num_words = num_sets * NUM_WAYS * NUM_WORDS
        words = np.zeros(num_words + 16, np.uint32)
        first = -words.ctypes.data % 64 // 4  # a set must not straddle a third line
        return cls(
            entries=words[first : first + num_words].reshape(-1, NUM_WORDS),
            calibration=_typical_calibration(),
            clock=np.zeros(1, np.int64),
            window=max_cached_tokens,
        )


def _typical_calibration() -> npt.NDArray[np.float32]:
    """A weak belief to start from: absolute discounting, as seen on Python source."""
    shape = (NUM_LEVELS, NUM_BUCKETS, NUM_BUCKETS, 2, 2)
    calibration = np.full(shape, 4.0, np.float32)
    typical = np.array((0.0, 1.0, 2.0, 3.0, 4.5, 7.0, 16.0, 60.0))
    for level, discount in enumerate(DISCOUNTS):
        count = np.maximum(typical - discount, 0.05)[:, None, None]
        total = np.maximum(typical[:, None, None] + typical[None, :, None], 1.0)
        calibration[level, ..., HITS] *= count / total
    return calibration


@native
def bucket_of(count: int) -> int:
    if count <= 3:
        return count
    if count <= 5:
        return 4
    if count <= 9:
        return 5
    return 6 if count <= 31 else 7


@native
def extend_hashes(
    hashes: npt.NDArray[np.uint64],  # [rows, MAX_ORDER + 1], [k]: the newest k tokens
    source: int,
    target: int,  # may be ``source``
    token: int,
) -> None:
    """Hash the contexts of row ``source``, followed by ``token``, into ``target``."""
    mixed = (np.uint64(token) + ONE) * TOKEN_MIX
    for order in range(MAX_ORDER, 0, -1):
        hashes[target, order] = hashes[source, order - 1] * ORDER_MIX + mixed
    hashes[target, 0] = np.uint64(0)


@native
def hash_history(
    hashes: npt.NDArray[np.uint64], history: npt.NDArray[np.int32], num_tokens: int
) -> None:
    hashes[0, :] = np.uint64(0)
    for position in range(max(0, num_tokens - MAX_ORDER), num_tokens):
        extend_hashes(hashes, 0, 0, history[position])


@native
def key_of(
    hash_of_context: np.uint64, level: int, salt: np.uint64, namespace: np.uint64
) -> np.uint64:
    """Whose contexts: one request's on local levels, else those of its namespace."""
    key = hash_of_context + np.uint64(ORDERS[level])
    key ^= salt if IS_LOCAL[level] else namespace
    key = (key ^ (key >> HALF)) * FINAL_MIX
    return key ^ (key >> HALF)


@native
def find(
    entries: npt.NDArray[np.uint32], clock: int, window: int, key: np.uint64
) -> int:
    """The entry of a context, or -1. Two contexts share one once in 2 ** 31."""
    num_sets = np.uint64(entries.shape[0] // NUM_WAYS)
    first = signed((key >> HALF) * num_sets >> HALF) * NUM_WAYS
    tag = np.uint32(key) | np.uint32(1)
    for entry in range(first, first + NUM_WAYS):
        if entries[entry, TAG] == tag:
            age = np.uint32(np.uint32(clock) - entries[entry, STAMP])
            return entry if signed(age) <= window else -1
    return -1


@native
def _claim(entries: npt.NDArray[np.uint32], clock: int, key: np.uint64) -> int:
    """An empty entry for a context that ``find`` missed; the stalest one gives way."""
    num_sets = np.uint64(entries.shape[0] // NUM_WAYS)
    first = signed((key >> HALF) * num_sets >> HALF) * NUM_WAYS
    tag = np.uint32(key) | np.uint32(1)
    stalest, greatest_age = first, -1
    for entry in range(first, first + NUM_WAYS):
        if entries[entry, TAG] == tag or entries[entry, TAG] == 0:
            stalest = entry
            break
        age = signed(np.uint32(np.uint32(clock) - entries[entry, STAMP]))
        if age > greatest_age:
            stalest, greatest_age = entry, age
    for word in range(NUM_WORDS):
        entries[stalest, word] = 0
    entries[stalest, TAG] = tag
    return stalest


@native
def read_followers(
    entries: npt.NDArray[np.uint32],
    entry: int,
    seen: npt.NDArray[np.int64],  # [rows, MAX_SEEN], token << SEEN_BITS | count
    row: int,
    num_seen: int,
) -> int:
    """Append the followers that better levels did not offer; return the new size."""
    num_known = num_seen
    for word in range(FOLLOWERS, NUM_WORDS):
        follower = signed(entries[entry, word])
        if follower == 0:
            break
        token = follower >> COUNT_BITS
        place = 0
        while place < num_known and seen[row, place] >> SEEN_BITS != token:
            place += 1
        if place == num_known:
            newest = NEWEST if word == FOLLOWERS else 0
            seen[row, num_seen] = token << SEEN_BITS | newest | follower & MAX_COUNT
            num_seen += 1
    return num_seen


@native
def total_count(
    seen: npt.NDArray[np.int64], row: int, first: int, num_seen: int
) -> int:
    total = 0
    for place in range(first, num_seen):
        total += seen[row, place] & MAX_COUNT
    return total


@native
def _calibrate(
    calibration: npt.NDArray[np.float32],
    level: int,
    seen: npt.NDArray[np.int64],
    first: int,
    num_seen: int,
    token: int,
) -> None:
    """Note, for every follower a level newly offered, whether it came true."""
    total = total_count(seen, 0, first, num_seen)
    for place in range(first, num_seen):
        count = seen[0, place] & MAX_COUNT
        newest = seen[0, place] >> COUNT_BITS & 1
        row, column = bucket_of(count), bucket_of(total - count)
        calibration[level, row, column, newest, TRIALS] += np.float32(1)
        if seen[0, place] >> SEEN_BITS == token:
            calibration[level, row, column, newest, HITS] += np.float32(1)
        if calibration[level, row, column, newest, TRIALS] > MAX_TRIALS:
            calibration[level, row, column, newest, TRIALS] *= np.float32(0.5)
            calibration[level, row, column, newest, HITS] *= np.float32(0.5)


@native
def _count(entries: npt.NDArray[np.uint32], entry: int, clock: int, token: int) -> None:
    """One more ``token`` after this context; it becomes the newest follower."""
    entries[entry, STAMP] = np.uint32(clock)
    rarest, least = FOLLOWERS, MAX_COUNT + 1
    count = 1
    for word in range(FOLLOWERS, NUM_WORDS):
        follower = signed(entries[entry, word])
        if follower >> COUNT_BITS == token and follower != 0:
            rarest, count = word, (follower & MAX_COUNT) + 1
            break
        if follower & MAX_COUNT <= least:
            rarest, least = word, follower & MAX_COUNT
        if follower == 0:
            break
    for word in range(rarest, FOLLOWERS, -1):
        entries[entry, word] = entries[entry, word - 1]
    entries[entry, FOLLOWERS] = np.uint32(token << COUNT_BITS | count)
    if count == MAX_COUNT:
        _halve(entries, entry)


@native
def _halve(entries: npt.NDArray[np.uint32], entry: int) -> None:
    """Make room in the counts; old habits fade. No count falls to zero."""
    for word in range(FOLLOWERS, NUM_WORDS):
        follower = signed(entries[entry, word])
        count = (follower & MAX_COUNT) + 1 >> 1
        entries[entry, word] = np.uint32(follower >> COUNT_BITS << COUNT_BITS | count)


@native
def _learn_text(
    entries: npt.NDArray[np.uint32],
    calibration: npt.NDArray[np.float32],
    clock: npt.NDArray[np.int64],
    window: int,
    history: npt.NDArray[np.int32],
    begin: int,
    end: int,
    salt: np.uint64,
    namespace: np.uint64,
    is_remembered: bool,
    calibrate_from: int,
) -> None:
    """Count ``history[begin:end]``, each token after its contexts.

    What is not remembered is counted on local levels alone.

    A level that is worse than the one that foresaw the token learns nothing: it keeps
    counting what only it can foresee. Tokens from ``calibrate_from`` on were written
    by the model and count as trials.
    """
    hashes = np.empty((1, MAX_ORDER + 1), np.uint64)
    seen = np.empty((1, MAX_SEEN), np.int64)
    hash_history(hashes, history, begin)
    for position in range(begin, end):
        token = int(history[position])
        is_token = 0 <= token <= MAX_TOKEN_ID  # not a placeholder
        clock[0] += 1
        now = int(clock[0])
        num_seen = 0
        foreseen = False
        for level in range(NUM_LEVELS if is_token else 0):
            if ORDERS[level] > position or not (is_remembered or IS_LOCAL[level]):
                continue
            key = key_of(hashes[0, ORDERS[level]], level, salt, namespace)
            entry = find(entries, now, window, key)
            if entry < 0:
                entry = _claim(entries, now, key)
            else:
                first = num_seen
                num_seen = read_followers(entries, entry, seen, 0, first)
                for place in range(first, num_seen):
                    foreseen |= seen[0, place] >> SEEN_BITS == token
                if position >= calibrate_from:
                    _calibrate(calibration, level, seen, first, num_seen, token)
            _count(entries, entry, now, token)
            if foreseen:
                break
        extend_hashes(hashes, 0, 0, token)


@native
def fingerprint(
    history: npt.NDArray[np.int32], begin: int, end: int, value: np.uint64
) -> np.uint64:
    """Extend the hash of ``history[:begin]`` to ``history[:end]``."""
    for position in range(begin, end):
        mixed = (np.uint64(history[position]) + ONE) * TOKEN_MIX
        value = (value ^ (value >> HALF)) * ORDER_MIX + mixed
    return value


@native
def learn_texts(
    entries: npt.NDArray[np.uint32],
    calibration: npt.NDArray[np.float32],
    clock: npt.NDArray[np.int64],
    window: int,
    slots: npt.NDArray[np.int32],  # [rows], the order to learn in
    token_ids: npt.NDArray[np.int32],
    num_new: npt.NDArray[np.int64],  # [rows]
    num_learned: npt.NDArray[np.int64],  # [max_num_reqs], advanced by num_new
    fingerprints: npt.NDArray[np.uint64],  # [max_num_reqs], of the tokens learned
    salts: npt.NDArray[np.uint64],  # [max_num_reqs]
    namespaces: npt.NDArray[np.uint64],  # [max_num_reqs], 0: everybody's
    is_remembered: npt.NDArray[np.bool_],  # [max_num_reqs]
    num_given: npt.NDArray[np.int64],  # [max_num_reqs], tokens not drafted for
) -> None:
    for row in range(slots.shape[0]):
        slot = slots[row]
        history, begin = token_ids[slot], num_learned[slot]
        end = begin + num_new[row]
        # How often followers came true is everybody's to see.
        is_public = namespaces[slot] == 0 and is_remembered[slot]
        _learn_text(
            entries,
            calibration,
            clock,
            window,
            history,
            begin,
            end,
            salts[slot],
            namespaces[slot],
            is_remembered[slot],
            num_given[slot] if is_public else end,
        )
        fingerprints[slot] = fingerprint(history, begin, end, fingerprints[slot])
        num_learned[slot] = end
