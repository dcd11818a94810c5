"""Build, verify and schedule on their own, with the torch twins."""

from __future__ import annotations

import numpy as np
import torch

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.build import TreeBuilder
from vllm_treespec.core.history import TokenHistory
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.propose import Candidates
from vllm_treespec.core.schedule import num_offered
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths, cut_paths, walk_target

CPU = torch.device("cpu")
KERNELS = choose_kernels(TreeSpecConfig(kernels="torch"), CPU)


def candidates(*rows):
    """Each row: (token, parent, probability given the parent) per candidate."""
    width = max(map(len, rows))
    result = Candidates(
        token_ids=np.zeros((len(rows), width), np.int32),
        parents=np.zeros((len(rows), width), np.int32),
        scores=np.zeros((len(rows), width), np.float32),
        num_candidates=np.array([len(row) for row in rows], np.int32),
    )
    for number, row in enumerate(rows):
        for column, (token, parent, probability) in enumerate(row):
            result.token_ids[number, column] = token
            result.parents[number, column] = parent
            parent_score = result.scores[number, parent] if parent >= 0 else 0.0
            result.scores[number, column] = parent_score + np.log(probability)
    return result


def build(proposals, *, num_nodes=9, budgets=None, chain_only=None):
    num_reqs = len(proposals[0].num_candidates)
    trees = TreeBuffers.allocate(6, num_nodes, CPU)
    builder = TreeBuilder(
        KERNELS, trees, num_proposers=len(proposals), max_candidates=8
    )
    slots = torch.tensor([5, 2, 0][:num_reqs])
    for proposer, proposal in enumerate(proposals):
        builder.upload(proposer, proposal)
    max_nodes, is_chain = torch.zeros(2, 6, dtype=torch.int32)
    max_nodes[slots] = torch.tensor(budgets or [num_nodes - 1] * num_reqs).int()
    is_chain[slots] = torch.tensor(chain_only or [0] * num_reqs).int()
    drafts = builder.build(
        slots, torch.ones_like(slots), max_nodes, is_chain, num_nodes=num_nodes - 1
    )
    return trees, slots, drafts


def test_as_many_nodes_as_are_likely_begin_the_tree():
    # 1 -- 2 -- 3 and 4, likelier than 3
    proposal = candidates(
        [(1, -1, 0.6), (2, 0, 0.5), (3, 1, 0.3), (4, -1, 0.2)], [(8, -1, 0.1)], []
    )
    trees = TreeBuffers.allocate(6, 9, CPU)
    builder = TreeBuilder(KERNELS, trees, num_proposers=1, max_candidates=8)
    builder.upload(0, proposal)
    slots = torch.tensor([5, 2, 0])
    build_all(builder, slots, num_nodes=8)
    scores = builder._merged.scores[5, :4].exp().sort(descending=True).values
    for count in range(1, 4):
        between = float(scores[count - 1] + scores[count]) / 2
        assert builder.num_likely(slots, between)[0] == count
    assert builder.num_likely(slots, 1e-9).tolist() == [4, 1, 0]
    assert builder.num_likely(slots, 1.0).tolist() == [0, 0, 0]
    assert trees.token_ids[5, 1:5].tolist() == [1, 2, 4, 3]


def build_all(builder, slots, *, num_nodes):
    """Of requests that have no limits of their own."""
    max_nodes = torch.full((6,), 99).int()
    return builder.build(
        slots,
        torch.ones_like(slots),
        max_nodes,
        torch.zeros_like(max_nodes),
        num_nodes=num_nodes,
    )


def learn(builder, slots, said):
    """What the target said to each slot, after a token that it knows."""
    token_ids = torch.full((6, 9), -1)
    num_tokens, num_emitted = torch.zeros(6).int(), torch.zeros(len(slots)).int()
    for row, tokens in enumerate(said):
        token_ids[slots[row], 1 : 1 + len(tokens)] = torch.tensor(tokens)
        num_tokens[slots[row]], num_emitted[row] = 1 + len(tokens), len(tokens)
    builder.learn(slots, num_emitted, token_ids, num_tokens)


def test_two_proposers_share_nodes_and_each_node_remembers_both():
    first = candidates([(7, -1, 0.9), (8, 0, 0.9)])
    second = candidates([(7, -1, 0.5), (9, 0, 0.8), (3, -1, 0.1)])
    trees, slots, drafts = build([first, second])
    slot = slots[0]
    assert trees.num_nodes[slot] == 5
    # 7 (.86, the mean of both), 7 8 (.46), 7 9 (.35), 3 (.08): best first
    assert drafts[0, :4].tolist() == [7, 8, 9, 3]
    assert trees.parents[slot, :5].tolist() == [-1, 0, 1, 1, 0]
    assert trees.proposers[slot, :5].tolist() == [0, 0b11, 0b01, 0b10, 0b10]
    assert trees.depths[slot, :5].tolist() == [0, 1, 2, 2, 1]
    assert trees.masks[slot, :5, 0].tolist() == [0b1, 0b11, 0b111, 0b1011, 0b10001]


def test_a_path_that_two_propose_gets_the_mean_of_what_they_make_of_it():
    first = candidates([(7, -1, 0.95), (3, -1, 0.6)])
    second = candidates([(7, -1, 0.001)])  # together .1, and 3 alone .28
    _, _, drafts = build([first, second])
    assert drafts[0, :2].tolist() == [3, 7]


def test_a_score_that_is_no_number_leaves_the_path_to_the_others():
    first = candidates([(7, -1, 0.9)])
    first.scores[0, 0] = np.nan
    trees, slots, drafts = build([first, candidates([(7, -1, 0.5), (8, 0, 0.5)])])
    assert drafts[0, :2].tolist() == [7, 8]
    assert trees.num_nodes[slots[0]] == 3


def test_a_path_is_judged_by_the_company_that_it_has():
    """The second proposer is right where the first is silent, else it is wrong."""
    trees = TreeBuffers.allocate(6, 2, CPU)
    builder = TreeBuilder(KERNELS, trees, num_proposers=2, max_candidates=8)
    builder.upload(0, candidates([(1, -1, 0.4)], *[[]] * 4))
    builder.upload(1, candidates(*[[(2, -1, 0.9)]] * 5))
    slots = torch.tensor([3, 0, 5, 1, 2])
    for step in range(160):
        drafts = build_all(builder, slots, num_nodes=1)
        # Of the first row, the first proposer's token is right in 2 of 5 steps.
        learn(builder, slots, [[1 if step % 5 < 2 else 9], [2], [2], [2], [2]])
    assert drafts[:, 0].tolist() == [1, 2, 2, 2, 2]


def test_budgets_differ_per_request_and_keep_the_best():
    row = [(1, -1, 0.3), (2, -1, 0.6), (3, 1, 0.9)]
    trees, slots, drafts = build([candidates(row, row, row)], budgets=[8, 2, 0])
    assert trees.num_nodes[slots].tolist() == [4, 3, 1]
    assert drafts[1].tolist() == [2, 3, 0, 0, 0, 0, 0, 0]
    assert drafts[2].tolist() == [0] * 8


def test_a_chain_is_the_best_path():
    row = [(1, -1, 0.6), (2, -1, 0.4), (3, 0, 0.5), (4, 0, 0.5), (5, 1, 0.9)]
    trees, slots, _ = build([candidates(row, row)], chain_only=[1, 0])
    assert trees.parents[slots[0], :3].tolist() == [-1, 0, 1]
    assert trees.token_ids[slots[0], 1:3].tolist() == [1, 3]
    assert trees.num_nodes[slots].tolist() == [3, 6]


def test_paths_end_before_an_invalid_node():
    trees, slots, _ = build([candidates([(1, -1, 0.9), (2, 0, 0.9), (3, 1, 0.9)])])
    paths = AcceptedPaths.allocate(6, 9, CPU)
    cu_num_logits = torch.tensor([0, 4], dtype=torch.int32)
    target = torch.tensor([1, 2, 3, 4])
    sampled, count = walk_target(KERNELS, trees, paths, slots, cu_num_logits, target)
    assert sampled[0, :4].tolist() == [1, 2, 3, 4]
    assert count.tolist() == [4]

    invalid = torch.tensor([False, False, True, False])
    cut_paths(paths, sampled, count, cu_num_logits, invalid)
    # Node 2 carried token 2, which is now the bonus token.
    assert sampled[0].tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0]
    assert count.tolist() == [2]
    assert paths.lengths[0] == 1


def test_a_reset_slot_accepts_nothing():
    trees, slots, _ = build([candidates([(1, -1, 0.9)])])
    trees.reset(int(slots[0]))
    paths = AcceptedPaths.allocate(6, 9, CPU)
    cu_num_logits = torch.tensor([0, 2], dtype=torch.int32)
    target = torch.tensor([1, 1])
    _, count = walk_target(KERNELS, trees, paths, slots, cu_num_logits, target)
    assert count.tolist() == [1]


def test_only_what_was_offered_is_scheduled():
    first = candidates([(1, -1, 0.9)], [(1, -1, 0.9), (2, -1, 0.1)], [])
    second = candidates([(1, -1, 0.9)], [(3, -1, 0.9)], [])
    assert num_offered([first, second]).tolist() == [2, 3, 0]


def test_scores_are_judged_by_what_the_target_said():
    """A boastful proposer's candidates stop pushing out those of a modest one."""
    boastful = candidates([(1, -1, 0.9), (2, -1, 0.09)])
    modest = candidates([(7, -1, 0.2), (8, -1, 0.1)])
    trees = TreeBuffers.allocate(6, 9, CPU)
    builder = TreeBuilder(KERNELS, trees, num_proposers=2, max_candidates=8)
    slots = torch.tensor([4])

    def draft():
        builder.upload(0, boastful)
        builder.upload(1, modest)
        return build_all(builder, slots, num_nodes=2)[0, :2].tolist()

    assert draft() == [1, 7]
    for step in range(160):
        learn(builder, slots, [[7 if step % 2 else 8]])
    assert sorted(draft()) == [7, 8]


def test_a_proposer_that_rests_leaves_nothing_behind():
    first, second = candidates([(1, -1, 0.9)]), candidates([(7, -1, 0.2)])
    trees = TreeBuffers.allocate(6, 9, CPU)
    builder = TreeBuilder(KERNELS, trees, num_proposers=2, max_candidates=8)
    builder.upload(0, first)
    builder.upload(1, second)
    builder.forget(0, 1)
    build_all(builder, torch.tensor([4]), num_nodes=8)
    assert trees.num_nodes[4] == 2
    assert trees.token_ids[4, 1] == 7


def builder_of_one():
    trees = TreeBuffers.allocate(6, 9, CPU)
    builder = TreeBuilder(KERNELS, trees, num_proposers=1, max_candidates=8)
    builder.upload(0, candidates([(1, -1, 0.5)], [(1, -1, 0.5)]))
    return builder


def num_known(builder):
    """Children that taught something."""
    return builder._mixture.memory[:, 0].sum()


def test_nothing_is_learned_for_a_request_that_took_the_slot():
    builder, slots = builder_of_one(), torch.tensor([4, 1])
    build_all(builder, slots, num_nodes=8)
    builder.reset(4)
    assert builder._trees.num_nodes[slots].tolist() == [1, 2]
    learn(builder, slots, [[2], [2]])
    assert num_known(builder) == 1


def test_nothing_is_learned_where_nothing_was_said():
    builder, slots = builder_of_one(), torch.tensor([4, 1])
    build_all(builder, slots, num_nodes=8)
    learn(builder, slots, [[], []])
    assert num_known(builder) == 0
    learn(builder, slots, [[1], []])
    assert num_known(builder) == 1


def test_drawn_candidates_come_first_and_teach_nothing():
    builder = builder_of_one()
    row = [(1, -1, 0.1), (2, -1, 0.9)]
    builder.upload(0, candidates(row, row))
    slots, eight = torch.tensor([4, 1]), torch.full((6,), 8).int()
    drafts = builder.build(
        slots,
        torch.ones_like(slots),
        eight,
        torch.zeros_like(eight),
        num_nodes=8,
        is_drawn=torch.tensor([True, False]),
    )
    assert drafts[:, :2].tolist() == [[1, 2], [2, 1]]
    learn(builder, slots, [[3], [3]])
    assert num_known(builder) == 2  # those of the other row


def taught(proposals, said, is_drawn=None):
    """By voice, how many children taught it something."""
    trees = TreeBuffers.allocate(6, 9, CPU)
    builder = TreeBuilder(
        KERNELS, trees, num_proposers=len(proposals), max_candidates=8
    )
    for proposer, proposal in enumerate(proposals):
        builder.upload(proposer, proposal)
    slots, eight = torch.tensor([4]), torch.full((6,), 8).int()
    builder.build(
        slots,
        torch.ones_like(slots),
        eight,
        torch.zeros_like(eight),
        num_nodes=8,
        is_drawn=is_drawn,
    )
    learn(builder, slots, [said])
    return builder._mixture.memory[:, 0].int().tolist()


def test_children_of_a_wrong_turn_teach_nothing():
    first = candidates([(1, -1, 0.6), (2, -1, 0.4), (3, 0, 0.5), (4, 1, 0.5)])
    assert taught([first], [2, 5]) == [3, 0, 0]  # all but the child of 1


def test_company_is_what_others_propose_at_the_same_node():
    first = candidates([(1, -1, 0.6), (2, 0, 0.4), (3, 1, 0.5)])
    second = candidates([(1, -1, 0.6), (4, 0, 0.4)])
    # Nobody else at 1 2 3; another at 1 2 and 1 4; both at 1.
    assert taught([first, second], [1, 2, 9]) == [1, 1, 1, 0, 1, 1]


def test_who_drew_its_candidates_says_nothing_of_them():
    both = candidates([(1, -1, 0.6), (2, 0, 0.4)])
    found = taught([both, both], [1, 2], torch.tensor([True]))
    assert found == [0, 0, 0, 0, 0, 2]


def test_a_proposer_that_is_never_right_loses_its_say():
    trees = TreeBuffers.allocate(6, 3, CPU)
    builder = TreeBuilder(KERNELS, trees, num_proposers=2, max_candidates=8)
    builder.upload(0, candidates([(1, -1, 0.9), (2, -1, 0.05)]))
    builder.upload(1, candidates([(3, -1, 0.3), (4, -1, 0.2)]))
    slots = torch.tensor([4])
    assert build_all(builder, slots, num_nodes=2)[0, 0] == 1
    for _ in range(20):
        learn(builder, slots, [[3]])
        drafts = build_all(builder, slots, num_nodes=2)
    assert drafts[0, 0] == 3


def test_history_grows_by_what_was_sampled_and_never_past_its_end():
    history = TokenHistory.allocate(3, 5)
    history.start(2, [7, 8, 9])
    history.start(0, [1])
    slots = np.array([2, 0], np.int32)
    newest = np.array([[3, 4, 5, 6], [1, 2, 99, 99]], np.int32)
    history.append(slots, newest)
    assert history.token_ids[2].tolist() == [7, 8, 9, 4, 5]
    assert history.num_tokens.tolist() == [2, 0, 5]
    assert history.token_ids[0, :2].tolist() == [1, 2]
