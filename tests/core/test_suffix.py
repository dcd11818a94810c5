"""The suffix proposer learns from everybody and scores honestly."""

import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from vllm_treespec.core.propose import Candidates, DecodeStep
from vllm_treespec.core.propose import suffix_index as model
from vllm_treespec.core.propose.suffix import SuffixProposer

MAX_MODEL_LEN = 4096


class Requests:
    """Histories in slots, the way the engine holds them."""

    def __init__(self, num_slots: int = 4) -> None:
        self.token_ids = np.full((num_slots, MAX_MODEL_LEN), -1, np.int32)
        self.num_tokens = np.zeros(num_slots, np.int64)

    def write(self, slot: int, tokens) -> "Requests":
        self.token_ids[slot, : len(tokens)] = tokens
        self.num_tokens[slot] = len(tokens)
        return self

    def step(self, *slots: int) -> DecodeStep:
        return DecodeStep(np.array(slots, np.int32), self.token_ids, self.num_tokens)


@pytest.fixture
def make():
    def build(**options: int | float) -> SuffixProposer:
        small = {"max_num_reqs": 4, "max_nodes": 32, "max_cached_tokens": 4000}
        return SuffixProposer(**{**small, **options})

    return build


def teach(proposer: SuffixProposer, *texts, slot: int = 3) -> None:
    """Earlier requests, which have left."""
    for text in texts:
        proposer.add_request(slot)
        proposer.learn(Requests().write(slot, text).step(slot))
        proposer.remove_request(slot)


@pytest.mark.parametrize("floor", [-1, -0.5, 0])
def test_a_high_floor_leaves_only_what_is_as_likely(make, floor):
    kept, found = [], [[1, 2, 3, 4, 5, 6]] * 3 + [[1, 2, 3, 7, 8, 9]]
    for least in (floor, -9):
        proposer = make(min_log_prob=least)
        teach(proposer, *found)
        candidates = draft(proposer, [1, 2])
        kept.append(candidates.scores[0, : candidates.num_candidates[0]])
    likely, whole = kept
    assert (likely >= floor - 1e-3).all()
    assert len(likely) == (whole >= floor).sum() < len(whole)


def draft(proposer: SuffixProposer, history, slot: int = 0) -> Candidates:
    return proposer.propose(Requests().write(slot, history).step(slot))


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


def test_a_loaded_step_gets_the_best_of_the_same_tree(make):
    proposer = make()
    teach(proposer, [1, 2, 3, 7, 8, 9], [1, 2, 3, 5, 6, 4])
    step = Requests().write(0, [1, 2, 3]).step(0)
    whole = proposer.propose(step)
    few = proposer.propose(replace(step, max_candidates=3))
    assert few.token_ids.shape == (1, 3) and whole.num_candidates[0] > 3
    assert few.token_ids[0].tolist() == whole.token_ids[0, :3].tolist()
    assert few.num_candidates[0] == 3


def test_a_longer_context_wins_over_a_more_frequent_short_one(make):
    proposer = make()
    teach(proposer, [1, 2, 3, 7], *([9, 8, 3, 5],) * 5)
    found = paths(draft(proposer, [1, 2, 3]))
    assert found[7,] > found[5,]


def test_shorter_contexts_go_on_where_the_longest_match_ends(make):
    proposer = make()
    teach(proposer, [10, 11, 12, 13], [20, 13, 14, 15])
    assert (13, 14, 15) in paths(draft(proposer, [10, 11, 12]))


def test_every_continuation_of_a_context_becomes_a_branch(make):
    proposer = make()
    teach(proposer, [1, 2, 5], [1, 2, 6], [1, 2, 7])
    assert {(5,), (6,), (7,)} <= paths(draft(proposer, [1, 2])).keys()


def test_a_request_finds_what_it_wrote_one_step_ago(make):
    proposer, requests = make(), Requests()
    proposer.add_request(0)
    proposer.learn(requests.write(0, [1, 2, 3, 4]).step(0))
    proposer.learn(requests.write(0, [1, 2, 3, 4, 5, 1, 2]).step(0))
    assert (3, 4, 5) in paths(proposer.propose(requests.step(0)))


def test_the_newest_tokens_are_context_before_they_are_learned(make):
    proposer, requests = make(), Requests()
    proposer.add_request(0)
    proposer.learn(requests.write(0, [1, 2, 3, 4, 5]).step(0))
    requests.write(0, [1, 2, 3, 4, 5, 1, 2])
    assert (3, 4, 5) in paths(proposer.propose(requests.step(0)))


def test_requests_share_what_they_wrote_across_slots_and_rows(make):
    proposer, requests = make(), Requests()
    for slot, text in ((2, [1, 2, 3, 4]), (0, [6, 7, 8, 9])):
        proposer.add_request(slot)
        requests.write(slot, text)
    proposer.learn(requests.step(2, 0))
    requests.write(0, [6, 7, 8, 9, 1, 2]).write(2, [1, 2, 3, 4, 6, 7])
    candidates = proposer.propose(requests.step(2, 0))
    assert (8, 9) in paths(candidates, row=0)
    assert (3, 4) in paths(candidates, row=1)


def test_a_requests_own_habit_outweighs_other_requests(make):
    proposer, requests = make(), Requests()
    teach(proposer, *([1, 2, 3],) * 3)
    proposer.add_request(0)
    proposer.learn(requests.write(0, [1, 2, 4, 0, 1, 2, 4, 0, 1, 2]).step(0))
    found = paths(proposer.propose(requests.step(0)))
    assert found[4,] > found[3,]


def test_clear_forgets_other_requests(make):
    proposer = make()
    teach(proposer, [1, 2, 3, 4])
    proposer.clear()
    assert not paths(draft(proposer, [1, 2]))


def test_a_flood_of_new_text_washes_old_text_out(make):
    proposer = make(max_cached_tokens=1000)
    teach(proposer, [1, 2, 3, 4])
    teach(proposer, np.arange(100, 1200))
    assert not paths(draft(proposer, [1, 2]))
    assert paths(draft(proposer, [1100, 1101]))


def test_text_within_the_bound_is_kept(make):
    proposer = make(max_cached_tokens=1000)
    teach(proposer, [1, 2, 3, 4], np.arange(100, 400))
    assert (3, 4) in paths(draft(proposer, [1, 2]))


def test_memory_is_what_the_docstring_says(make):
    entries = make(max_cached_tokens=10_000)._index.entries
    assert entries.nbytes == pytest.approx(10_000 * model.BYTES_PER_TOKEN, rel=0.01)
    assert f"{model.BYTES_PER_TOKEN} bytes per cached token" in SuffixProposer.__doc__


@pytest.mark.parametrize("new_slot", [0, 1])
def test_a_preempted_request_is_not_counted_twice(make, new_slot):
    proposer = make()
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    proposer.add_request(0)
    proposer.learn(Requests().write(0, text).step(0))
    before = paths(draft(proposer, text, slot=0))
    proposer.remove_request(0)
    proposer.add_request(new_slot)
    proposer.learn(Requests().write(new_slot, text).step(new_slot))
    assert paths(draft(proposer, text, slot=new_slot)) == before


def test_a_new_request_with_other_text_is_learned_in_a_used_slot(make):
    proposer = make()
    teach(proposer, [1, 2, 3, 4], [5, 6, 7, 8], slot=0)
    assert (7, 8) in paths(draft(proposer, [5, 6]))


def test_a_conversations_next_turn_learns_only_what_is_new(make):
    proposer = make()
    teach(proposer, list(range(50)))
    clock = int(proposer._index.clock[0])
    teach(proposer, [*range(50), 3, 4, 77])
    assert proposer._index.clock[0] - clock == 3
    assert (77,) in paths(draft(proposer, [3, 4]))


def test_a_long_prompt_is_learned_in_pieces(make):
    proposer, requests = make(max_learned_tokens=10), Requests()
    proposer.add_request(0)
    requests.write(0, [*range(35), 30, 31])
    proposer.learn(requests.step(0))
    assert not paths(proposer.propose(requests.step(0)))
    for _ in range(3):
        proposer.learn(requests.step(0))
    assert (32, 33, 34) in paths(proposer.propose(requests.step(0)))


def test_a_long_prompt_does_not_delay_the_others(make):
    proposer, requests = make(max_learned_tokens=10), Requests()
    proposer.add_request(0)
    proposer.add_request(1)
    requests.write(0, range(100, 200)).write(1, [1, 2, 3, 1, 2])
    proposer.learn(requests.step(0, 1))
    assert (3,) in paths(proposer.propose(requests.step(1)))


@pytest.mark.parametrize("history", [[], [1]])
def test_a_history_without_context_is_harmless(make, history):
    proposer = make()
    proposer.add_request(0)
    proposer.learn(Requests().write(0, history).step(0))
    assert not paths(draft(proposer, history))


def test_an_empty_batch_gives_an_empty_answer(make):
    proposer = make()
    proposer.learn(Requests().step())
    assert proposer.propose(Requests().step()).token_ids.shape[0] == 0


def test_placeholders_are_never_suggested(make):
    proposer = make()
    teach(proposer, [1, 2, -1, 1, 2, model.MAX_TOKEN_ID + 1, 1, 2])
    assert (1,) not in paths(draft(proposer, [1]))
    assert all(
        0 <= token <= 2 for path in paths(draft(proposer, [1])) for token in path
    )


def test_read_only_histories_are_accepted_and_left_alone(make):
    proposer, requests = make(), Requests()
    requests.write(0, [1, 2, 3, 1, 2])
    before = requests.token_ids.copy()
    requests.token_ids.flags.writeable = False
    proposer.add_request(0)
    proposer.learn(requests.step(0))
    assert (3,) in paths(proposer.propose(requests.step(0)))
    assert np.array_equal(requests.token_ids, before)


@pytest.mark.parametrize("seed", range(8))
def test_trees_are_sound_on_any_text(make, seed):
    rng = np.random.default_rng(seed)
    num_tokens, vocab = 600, int(rng.choice([1, 2, 5, 40]))
    max_nodes, max_depth = int(rng.integers(1, 70)), int(rng.integers(1, 9))
    proposer = make(max_nodes=max_nodes, max_depth=max_depth, min_log_prob=-12.0)
    text = rng.integers(100, 100 + vocab, num_tokens).astype(np.int32)
    requests = Requests()
    proposer.add_request(1)
    end = 1
    while end < num_tokens:
        requests.write(1, text[:end])
        candidates = proposer.propose(requests.step(1))
        proposer.learn(requests.step(1))
        check(candidates, text[:end], max_nodes, max_depth)
        end += int(rng.integers(1, 40))


def check(candidates, history, max_nodes, max_depth):
    found = paths(candidates)
    assert len(found) <= max_nodes
    mass: dict[tuple[int, ...], float] = defaultdict(float)
    for path, prob in found.items():
        assert 0.0 < prob <= 1.0
        assert len(path) <= max_depth
        assert set(path) <= set(history.tolist())
        mass[path[:-1]] += prob
    assert all(total <= 1.0 + 1e-5 for total in mass.values())
    parents = candidates.parents[0, : len(found)]
    assert (parents < np.arange(len(found))).all()
    assert (parents >= -1).all()


def test_the_same_calls_give_the_same_drafts(make):
    def run() -> list[dict[tuple[int, ...], float]]:
        proposer, requests, drafts = make(), Requests(), []
        text = np.random.default_rng(0).integers(0, 6, 300)
        proposer.add_request(0)
        for end in range(1, 300, 3):
            drafts.append(
                paths(proposer.propose(requests.write(0, text[:end]).step(0)))
            )
            proposer.learn(requests.step(0))
        return drafts

    assert run() == run()


def test_probabilities_approach_the_true_frequencies(make):
    """After a 1 comes a 2 in 70 and a 3 in 30 cases out of 100, then a 4."""
    rng = np.random.default_rng(1)
    choices = rng.choice([2, 3], p=[0.7, 0.3], size=1000)
    text = np.stack([np.ones(1000), choices, np.full(1000, 4)], axis=1).flatten()
    proposer, requests, probs = make(), Requests(), []
    proposer.add_request(0)
    for end in range(1, 3000, 3):
        found = paths(proposer.propose(requests.write(0, text[:end]).step(0)))
        probs.append([found.get((token,), 0.0) for token in (2, 3)])
        proposer.learn(requests.step(0))
    assert np.mean(probs[200:], axis=0) == pytest.approx([0.7, 0.3], abs=0.1)


class Twin:
    """The model with dictionaries: slow, obvious, no eviction."""

    def __init__(self) -> None:
        # (level, request or None, context) -> {token: count}, most recent first
        self.followers: dict[tuple, dict[int, int]] = defaultdict(dict)
        self.calibration = model._typical_calibration().astype(np.float64)

    def contexts(self, request: int, history: list[int]):
        for level, (order, local) in enumerate(
            zip(model.ORDERS, model.IS_LOCAL, strict=True)
        ):
            if order <= len(history):
                yield level, request if local else None, tuple(history[-order:])

    def offers(self, context: tuple, excluded: set[int]):
        """(token, place in the calibration) of what the context newly offers."""
        followers = self.followers.get(context, {})
        fresh = {tok: num for tok, num in followers.items() if tok not in excluded}
        newest = next(iter(followers), None)
        for token, count in fresh.items():
            rest = sum(fresh.values()) - count
            row, column = model.bucket_of(count), model.bucket_of(rest)
            yield token, (context[0], row, column, int(token == newest))

    def learn(self, request: int, history: list[int], token: int, trial: bool) -> None:
        seen: set[int] = set()
        for context in self.contexts(request, history):
            offers = list(self.offers(context, seen))
            for other, place in offers:
                if trial:
                    self.calibration[place][model.TRIALS] += 1
                    self.calibration[place][model.HITS] += other == token
                seen.add(other)
            followers = self.followers[context]
            if token not in followers and len(followers) == model.NUM_FOLLOWERS:
                rarest = min(reversed(followers), key=followers.__getitem__)
                del followers[rarest]
            count = followers.pop(token, 0) + 1
            self.followers[context] = {token: count, **followers}
            if token in seen:
                break

    def predict(self, request: int, history: list[int]) -> dict[int, float]:
        withheld, found = 1.0, {}
        for context in self.contexts(request, history):
            shares = {}
            for token, place in self.offers(context, set(found)):
                hits, trials = self.calibration[place]
                shares[token] = hits / trials
            mass = sum(shares.values())
            scale = withheld * min(1.0, 0.999 / mass) if mass else 0.0
            found |= {token: scale * share for token, share in shares.items()}
            withheld *= 1.0 - min(mass, 0.999)
        return found


@pytest.mark.parametrize("seed", range(4))
def test_scores_match_the_slow_twin(make, seed):
    rng = np.random.default_rng(seed)
    proposer = make(max_nodes=64, max_depth=1, min_log_prob=-30.0)
    twin, requests = Twin(), Requests()
    for request in range(3):  # one after the other in the same slot
        text = rng.integers(0, 3 + 3 * seed, 90).tolist()
        proposer.add_request(0)
        num_given, learned = 20, 0
        for end in range(num_given, len(text), 7):
            proposer.learn(requests.write(0, text[:end]).step(0))
            for position in range(learned, end):
                trial = position >= num_given
                twin.learn(request, text[:position], text[position], trial)
            learned = end
            found = paths(proposer.propose(requests.step(0)))
            expected = twin.predict(request, text[:end])
            assert {path[0] for path in found} == set(expected)
            for token, prob in expected.items():
                assert found[token,] == pytest.approx(prob, rel=1e-3)


@pytest.mark.parametrize("vocab", [1, 100, 50_000])
def test_a_tree_takes_microseconds_whatever_the_text(make, vocab):
    proposer, requests = make(max_cached_tokens=100_000), Requests()
    rng = np.random.default_rng(0)
    for slot in range(4):
        proposer.add_request(slot)
        requests.write(slot, rng.integers(0, vocab, MAX_MODEL_LEN))
    for _ in range(4):
        proposer.learn(requests.step(0, 1, 2, 3))
    elapsed_s = []
    for _ in range(50):
        begin = time.perf_counter()
        proposer.propose(requests.step(0, 1, 2, 3))
        elapsed_s.append(time.perf_counter() - begin)
    assert min(elapsed_s) / 4 < 300e-6


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_num_reqs", 0),
        ("max_nodes", 0),
        ("max_depth", 0),
        ("max_cached_tokens", 0),
        ("max_learned_tokens", -1),
        ("min_log_prob", 0.5),
    ],
)
def test_an_impossible_option_is_named(make, option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        make(**{option: value})


PERSONAL = [5, 6, 7, 8, 9, 10, 11, 12]


def tell(proposer: SuffixProposer, text, namespace: int, *, remember=True) -> None:
    """A request of that namespace comes, is learned from and leaves."""
    proposer.add_request(3)
    proposer.keep_apart(3, namespace, is_remembered=remember)
    proposer.learn(Requests().write(3, text).step(3))
    proposer.remove_request(3)


def drafted_for(proposer: SuffixProposer, history, namespace: int) -> Candidates:
    proposer.add_request(0)
    proposer.keep_apart(0, namespace, is_remembered=True)
    step = Requests().write(0, history).step(0)
    candidates = proposer.propose(step)
    proposer.learn(step)  # resumes what it finds
    later = proposer.propose(step)
    proposer.remove_request(0)
    return candidates if candidates.num_candidates[0] else later


@pytest.mark.parametrize("reader", [0, 2])
def test_a_namespaces_text_is_a_draft_for_itself_alone(make, reader):
    proposer = make()
    tell(proposer, PERSONAL, 1)
    assert drafted_for(proposer, PERSONAL[:4], reader).num_candidates[0] == 0
    assert drafted_for(proposer, PERSONAL[:4], 1).num_candidates[0] > 0


def test_a_namespace_is_not_told_what_everybody_wrote(make):
    proposer = make()
    teach(proposer, PERSONAL)
    assert drafted_for(proposer, PERSONAL[:4], 1).num_candidates[0] == 0


def test_a_conversation_is_not_resumed_under_another_namespace(make):
    proposer = make()
    text = [5, 6, 5, 7, 5]  # its own contexts would offer 6 and 7 at once
    tell(proposer, text, 1)
    clock = proposer.num_cached_tokens
    tell(proposer, text, 2)
    assert proposer.num_cached_tokens == clock + len(text)
    tell(proposer, text, 1)
    assert proposer.num_cached_tokens == clock + len(text), "resumed under its own"


def test_what_is_not_remembered_is_a_draft_for_its_own_request_alone(make):
    proposer = make()
    request = Requests().write(1, [*PERSONAL, *PERSONAL[:3]]).step(1)
    proposer.add_request(1)
    proposer.keep_apart(1, 0, is_remembered=False)
    proposer.learn(request)
    assert paths(proposer.propose(request))
    proposer.remove_request(1)
    assert drafted_for(proposer, PERSONAL[:4], 0).num_candidates[0] == 0


@pytest.mark.parametrize(("namespace", "remember"), [(1, True), (0, False)])
def test_rates_are_everybodys_so_no_apart_request_teaches_them(
    make, namespace, remember
):
    proposer = make()
    before = proposer._index.calibration.copy()
    proposer.add_request(1)
    proposer.keep_apart(1, namespace, is_remembered=remember)
    written = Requests()
    for size in range(2, 40):
        proposer.learn(written.write(1, ([1, 2, 3] * 20)[:size]).step(1))
    assert (proposer._index.calibration == before).all()


def test_a_thousand_namespaces_take_no_memory_and_no_time(make):
    def seconds(num_namespaces: int) -> float:
        proposer = make(max_cached_tokens=50_000)
        size = proposer._index.entries.nbytes
        random = np.random.default_rng(0)
        text = random.integers(2, 50, 200)
        for request in range(1000):
            tell(proposer, random.permutation(text), 1 + request % num_namespaces)
        assert proposer._index.entries.nbytes == size
        assert len(proposer._left) <= 4
        proposer.add_request(0)
        proposer.keep_apart(0, 1, is_remembered=True)
        step = Requests().write(0, text).step(0)
        times = []
        for _ in range(200):
            start = time.perf_counter()
            proposer.propose(step)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(1000) < 1.5 * seconds(1)
