import heapq
import random

import pytest
import torch

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.build import TreeBuilder
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.propose.recycle import (
    MAX_AGE,
    Contexts,
    Recycler,
    Successors,
)
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.kernels.recycling import NONE, PICK_WEIGHT, RATE
from vllm_treespec.kernels.reference.successors import (
    log_rates,
    log_weights,
    look_up,
    rows_of,
)
from vllm_treespec.testing.no_sync import NoSync

CPU = torch.device("cpu")
KERNELS = choose_kernels(TreeSpecConfig(kernels="torch"), CPU)
VOCAB_SIZE = 23
DEPTH, K = 4, 3


def contexts(pairs):
    before, token_ids = zip(*pairs, strict=True)
    return Contexts(torch.tensor(before), torch.tensor(token_ids))


def recycler(max_nodes=9, num_pairs=None, k=K, device=CPU):
    made = Recycler(
        choose_kernels(TreeSpecConfig(), device) if device != CPU else KERNELS,
        vocab_size=VOCAB_SIZE,
        k=k,
        depth=DEPTH,
        max_nodes=max_nodes,
        max_num_reqs=8,
        device=device,
    )
    if num_pairs is not None:
        made.table = Successors.allocate(VOCAB_SIZE, k, CPU, num_pairs)
    return made


def learn(table, pairs, successors, weights, order, max_age=1):
    """Blend what followed some contexts, in an order of its own."""
    learned = contexts(pairs)
    rows = rows_of(*learned, VOCAB_SIZE, table.owners.shape[0])
    keys = (rows << 32) | order
    KERNELS.blend_successors(
        *keys.flatten().sort(),
        *learned,
        successors,
        weights,
        VOCAB_SIZE,
        table.owners,
        table.token_ids,
        table.weights,
        max_age,
    )


def prompt_of(*token_ids):
    return torch.tensor([NONE, *token_ids])


class PlainTable:
    """Rows as dicts: successor -> weight. Pairs never share a row."""

    def __init__(self):
        self.rows = {}

    def learn(self, before, token_id, said):
        if not 0 <= token_id < VOCAB_SIZE:
            return
        keys = [(token_id,)]
        if 0 <= before < VOCAB_SIZE:
            keys.append((before, token_id))
        for key in keys:
            row = {t: w * (1 - RATE) for t, w in self.rows.get(key, {}).items()}
            for token, weight in said.items():
                row[token] = row.get(token, 0.0) + RATE * weight
            best = sorted(row.items(), key=lambda each: -each[1])[:K]
            self.rows[key] = {token: w for token, w in best if w > 0}

    def row(self, before, token_id):
        return self.rows.get((before, token_id), self.rows.get((token_id,), {}))


def row_of(table, before, token_id):
    """Successors of a context in their order, with their weights."""
    rows, _ = look_up(*contexts([(before, token_id)]), VOCAB_SIZE, table.owners)
    found = zip(
        table.token_ids[rows[0]].tolist(), table.weights[rows[0]].tolist(), strict=True
    )
    return {token: pytest.approx(weight) for token, weight in found if token != NONE}


def test_the_table_is_its_plain_twin_on_any_sequence_of_rows():
    """No two contexts share a row here: there are many more rows than pairs."""
    rng = random.Random(0)
    table, twin = Successors.allocate(VOCAB_SIZE, K, CPU, 2**20), PlainTable()
    for _ in range(60):
        # Few tokens, so that contexts come again within a call; some are none.
        rows = [
            (rng.randrange(-1, 5), rng.choice([0, 1, 2, 3, 4, NONE, VOCAB_SIZE, 999]))
            for _ in range(rng.randrange(1, 12))
        ]
        width = rng.randrange(1, K + 2)
        said = [rng.sample(range(VOCAB_SIZE), width) for _ in rows]
        weights = [[rng.random() / width for _ in range(width)] for _ in rows]
        order = rng.sample(range(100), len(rows))
        learn(
            table,
            rows,
            torch.tensor(said, dtype=torch.int32),
            torch.tensor(weights),
            torch.tensor(order),
            max_age=12,
        )
        for place in sorted(range(len(rows)), key=order.__getitem__):
            twin.learn(
                *rows[place], dict(zip(said[place], weights[place], strict=True))
            )
        for before in range(-1, 6):
            for token_id in range(VOCAB_SIZE):
                expected = twin.row(before, token_id)
                found = row_of(table, before, token_id)
                assert found == expected and list(found) == list(expected)
    assert len(twin.rows) > 20
    assert bool((table.token_ids[table.nobody] == NONE).all()), "learned for nobody"
    assert int(table.owners[table.nobody]) == NONE


def test_of_a_context_that_comes_again_the_newest_counts():
    table = Successors.allocate(VOCAB_SIZE, K, CPU, 64)
    learn(
        table,
        [(1, 2), (1, 2), (1, 2)],
        torch.tensor([[5], [6], [7]], dtype=torch.int32),
        torch.ones(3, 1),
        torch.tensor([1, 9, 4]),
    )
    assert row_of(table, 1, 2) == row_of(table, NONE, 2) == {6: RATE}


def test_a_pair_whose_row_was_taken_by_another_is_forgotten_not_mistaken():
    table = Successors.allocate(VOCAB_SIZE, K, CPU, num_pairs=1)
    for before, said in ((1, 7), (3, 8)):
        learn(
            table,
            [(before, 2)],
            torch.tensor([[said]], dtype=torch.int32),
            torch.ones(1, 1),
            torch.zeros(1, dtype=torch.int64),
        )
    assert row_of(table, 3, 2) == {8: RATE}
    # The token's own row has both.
    both = {8: RATE, 7: RATE * (1 - RATE)}
    assert row_of(table, 1, 2) == row_of(table, NONE, 2) == both


def test_a_prompt_teaches_what_it_goes_on_with():
    made = recycler()
    made.learn_prompt(prompt_of(4, 5, 6, 5, 7, 999, 5, 9))
    twin = PlainTable()
    prompt = [(NONE, 4, 5), (4, 5, 6), (5, 6, 5), (6, 5, 7), (999, 5, 9)]
    for before, token_id, said in prompt:
        twin.learn(before, token_id, {said: 1.0})
    for before in (NONE, 4, 5, 6, 7):
        for token_id in range(VOCAB_SIZE):
            assert row_of(made.table, before, token_id) == twin.row(before, token_id)
    assert row_of(made.table, 7, 5) == row_of(made.table, NONE, 5)


@pytest.mark.parametrize("prompt", [[], [3]])
def test_a_prompt_without_a_pair_teaches_nothing(prompt):
    made = recycler()
    made.learn_prompt(prompt_of(*prompt))
    assert bool((made.table.token_ids == NONE).all())


def test_of_a_prompt_only_the_last_occurrences_of_a_context_are_kept():
    made = recycler()
    said = [10, 11, 12, 13, 14, 15]
    prompt = [token for each in said for token in (1, each)]
    made.learn_prompt(prompt_of(*prompt))
    assert MAX_AGE == 4
    assert list(row_of(made.table, NONE, 1)) == [15, 14, 13]


def test_logits_teach_the_best_tokens_and_the_pick_more_than_all_others():
    made = recycler()
    logits = torch.full((2, VOCAB_SIZE), -5.0)
    logits[:, [8, 3, 14]] = torch.tensor([4.0, 3.0, 2.0])
    # The second node's pick is none of its best, and takes the last one's place.
    made.learn_nodes(contexts([(0, 1), (0, 2)]), logits, torch.tensor([3, 20]))
    shares = torch.tensor([4.0, 3.0, 2.0]).softmax(0).tolist()
    weights = [RATE * (1 - PICK_WEIGHT) * share for share in shares]
    pick = RATE * PICK_WEIGHT
    first = {3: weights[1] + pick, 8: weights[0], 14: weights[2]}
    second = {20: pick + weights[2], 8: weights[0], 3: weights[1]}
    assert row_of(made.table, 0, 1) == first
    assert row_of(made.table, 0, 2) == second
    assert list(row_of(made.table, 0, 1)) == [3, 8, 14]


def test_padding_masked_tokens_and_broken_logits_teach_nothing():
    made = recycler()
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[1] = -torch.inf
    logits[1, 9] = 1.0  # as a grammar leaves it
    logits[2, 4] = torch.nan
    made.learn_nodes(
        contexts([(0, NONE), (0, 2), (0, 3)]), logits, torch.tensor([NONE] * 3)
    )
    assert row_of(made.table, 0, 2) == {9: RATE}
    assert row_of(made.table, 0, 3) == {}
    assert bool((made.table.token_ids[made.table.nobody] == NONE).all())


def test_what_the_target_went_along_with_counts_as_newer_than_guesses():
    made = recycler()
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[0, 7], logits[1, 8] = 50.0, 50.0
    made.learn_nodes(contexts([(0, 1), (0, 1)]), logits, torch.tensor([7, NONE]))
    assert next(iter(row_of(made.table, 0, 1))) == 7


def teach_randomly(made, seed, num_tokens=60):
    rng = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=rng)
    logits = 3 * torch.randn(num_tokens - 1, VOCAB_SIZE, generator=rng)
    made.learn_nodes(Contexts(token_ids[:-1], token_ids[1:]), logits, logits.argmax(1))


def best_first(made, before, root, max_nodes):
    """The likeliest paths, one after the other: [(path, score)]."""
    found, heap = [], [(0.0, (), before, root)]
    while heap and len(found) <= max_nodes:
        cost, path, before, token_id = heapq.heappop(heap)
        found.append((path, -cost))
        if len(path) == DEPTH:
            continue
        table, context = made.table, contexts([(before, token_id)])
        rows, is_pair = look_up(*context, VOCAB_SIZE, table.owners)
        successors, scores = table.token_ids[rows], log_weights(table.weights[rows])
        log_probs = log_rates(scores, is_pair, made.rates.knots)
        for child, log_prob in zip(
            successors.flatten().tolist(), log_probs.flatten().tolist(), strict=True
        ):
            if child != NONE:
                heapq.heappush(heap, (cost - log_prob, (*path, child), token_id, child))
    return found[1:]


def candidates_of(out, req):
    paths = []
    for node in range(int(out.num_candidates[req])):
        parent = int(out.parents[req, node])
        assert -1 <= parent < node
        above = paths[parent][0] if parent >= 0 else ()
        score = float(out.scores[req, node])
        assert score <= (paths[parent][1] if parent >= 0 else 0.0)
        paths.append(((*above, int(out.token_ids[req, node])), score))
    return paths


@pytest.mark.parametrize("max_nodes", [1, 2, 7, 40])
def test_trees_are_the_likeliest_paths(max_nodes):
    made = recycler(max_nodes)
    teach_randomly(made, seed=max_nodes)
    out = DeviceCandidates.allocate(1, 6, max_nodes, CPU).of(0)
    # An unknown pair, a known one, no pair at all, a token that is none, a token
    # that was never met.
    made.table.token_ids[11], made.table.weights[11] = NONE, 0.0
    roots = contexts([(0, 5), (1, 2), (NONE, 3), (2, VOCAB_SIZE), (NONE, 11)])
    made.grow(roots, torch.ones(5, dtype=torch.bool), out)
    for req, (before, root) in enumerate(
        zip(*(each.tolist() for each in roots), strict=True)
    ):
        expected = best_first(made, before, root, max_nodes)
        found = candidates_of(out, req)
        assert len({path for path, _ in found}) == len(found) == len(expected)
        assert [score for _, score in found] == pytest.approx(
            [score for _, score in expected], abs=1e-5
        )
    assert out.num_candidates[:3].tolist() == [max_nodes] * 3
    assert out.num_candidates[3:5].tolist() == [0, 0]
    assert made.num_candidates >= max_nodes


def test_requests_that_are_not_active_get_nothing():
    made = recycler()
    teach_randomly(made, seed=1)
    out = DeviceCandidates.allocate(1, 3, 9, CPU).of(0)
    out.num_candidates.fill_(5)
    made.grow(contexts([(0, 5), (0, 5)]), torch.tensor([False, True]), out)
    assert out.num_candidates.tolist() == [0, 9, 5]


def test_how_often_a_weight_is_right_decides_whether_trees_are_deep_or_wide():
    """The table says the same of both; only what was right differs."""

    def depth_after(said):
        made = recycler(max_nodes=6)
        logits = torch.full((VOCAB_SIZE, VOCAB_SIZE), -9.0)
        tokens = torch.arange(VOCAB_SIZE)
        for rank, logit in enumerate((2.0, 1.0, 0.0)):
            logits[tokens, (tokens + 1 + rank) % VOCAB_SIZE] = logit
        made.learn_nodes(Contexts(tokens - 1, tokens), logits, logits.argmax(1))
        for _ in range(64):
            roots = contexts([(4, 5)] * 8)
            made.learn_rates(
                roots, torch.tensor([said] * 8), torch.full((8,), len(said))
            )
        out = DeviceCandidates.allocate(1, 1, 6, CPU).of(0)
        made.grow(contexts([(4, 5)]), torch.tensor([True]), out)
        return max(len(path) for path, _ in candidates_of(out, 0))

    assert depth_after([6, 7, 8, 9]) == DEPTH  # the favourite, always
    assert depth_after([8]) < DEPTH  # the third


def test_what_was_said_past_the_end_or_behind_a_miss_teaches_no_rates():
    made = recycler()
    made.learn_prompt(prompt_of(1, 2, 3, 4, 5))
    # Stale columns are nothing, a miss ends it, and an unknown root knows nothing.
    for root, emitted, num_emitted, right, known in (
        (1, [2, 3, 4, 9], 2, [1, 1], [1, 1]),  # by a token's row, then by a pair's
        (1, [2, 8, 4, 5], 4, [1, 0], [1, 1]),
        (9, [1, 2, 3, 4], 4, [0, 0], [0, 0]),
    ):
        made.rates.right.zero_()
        made.rates.known.zero_()
        roots, said = contexts([(NONE, root)]), torch.tensor([emitted])
        made.learn_rates(roots, said, torch.tensor([num_emitted]))
        assert made.rates.right.sum(1).tolist() == right
        assert made.rates.known.sum(1).tolist() == known


def test_clearing_forgets_every_successor():
    made = recycler()
    teach_randomly(made, seed=2)
    made.clear()
    out = DeviceCandidates.allocate(1, 1, 9, CPU).of(0)
    made.grow(contexts([(0, 5)]), torch.tensor([True]), out)
    assert out.num_candidates.tolist() == [0]


def test_the_watchman_sees_what_waits():
    tensor = torch.tensor([1, 0])
    for waits in (
        lambda: tensor.sum().item(),
        lambda: tensor[tensor > 0],
        lambda: tensor.nonzero(),
        lambda: bool(tensor.any()),
        lambda: torch.repeat_interleave(tensor),
    ):
        with pytest.raises(AssertionError), NoSync():
            waits()


def steps(made, builder, device):
    """From logits to a tree, often enough that rates and scores are fitted anew."""
    logits = torch.randn(5, VOCAB_SIZE, device=device)
    nodes, roots = (
        Contexts(*(each.to(device) for each in contexts(pairs)))
        for pairs in ([(0, 1), (1, 2), (1, 3), (0, 1), (1, NONE)], [(0, 1), (2, 3)])
    )
    picks = torch.tensor([2, 3, NONE, 4, NONE], device=device)
    active = torch.tensor([True, False], device=device)
    emitted = torch.tensor([[2, 3, 0], [4, 0, 0]], device=device)
    counts = torch.tensor([2, 1], dtype=torch.int32, device=device)
    prompt = prompt_of(1, 2, 3, 1, 2).to(device)
    slots = torch.tensor([1, 0], device=device)
    # [3] per slot
    max_nodes = torch.full((3,), 9, dtype=torch.int32, device=device)
    chain_only, num_tokens = torch.zeros_like(max_nodes), max_nodes.clone()
    texts = torch.ones(3, 9, dtype=torch.int32, device=device)

    def run():
        made.learn_prompt(prompt)
        for _ in range(40):
            made.learn_rates(roots, emitted, counts)
            made.learn_nodes(nodes, logits, picks)
            builder.learn(slots, counts, texts, num_tokens)
            made.grow(roots, active, builder.candidates.of(0))
            builder.build(slots, counts, max_nodes, chain_only, num_nodes=9)

    return run


def builder_on(device, kernels):
    trees = TreeBuffers.allocate(3, 10, device)
    return TreeBuilder(kernels, trees, num_proposers=1, max_candidates=9)


def test_nothing_waits_for_the_device_from_logits_to_trees():
    """The kernels are left out: a launch does not wait, and their twins do."""
    made, watch = recycler(max_nodes=9), NoSync()
    kernels = watch.wrap(KERNELS)
    made._kernels = made.rates._kernels = kernels
    builder = builder_on(CPU, kernels)
    run = steps(made, builder, CPU)
    with watch, watch.during("steps"):
        run()
    assert watch.num_calls >= 80  # topk and sort
    assert {"merge_candidates", "fit_rates", "grow_paths"} <= set(watch.names["steps"])
    counts = builder.candidates.of(0).num_candidates.tolist()
    assert counts[0] > 0 and counts[1:] == [0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA itself")
def test_nothing_waits_for_a_gpu():
    device = torch.device("cuda")
    made, kernels = recycler(device=device), choose_kernels(TreeSpecConfig(), device)
    run = steps(made, builder_on(device, kernels), device)
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
