"""Trees of a toy model whose next token depends on the whole path, read from the mask."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.propose.draft_tree import TreeGrower
from vllm_treespec.core.propose.drawing import Drawing
from vllm_treespec.core.propose.shapes import BestFirst, FixedShape
from vllm_treespec.core.propose.template import TreeTemplate
from vllm_treespec.kernels.reference.drawn_trees import (
    BatchTree,
    recursive_rejection,
    traversal,
)
from vllm_treespec.testing.enumerate import Outcomes, joint, total_variation

CPU = torch.device("cpu")
VOCAB_SIZE = 23


def toy_logits(req, path):
    """Any function of the request and the path will do."""
    digest = hashlib.sha256(repr((req, path)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return 2 * torch.randn(VOCAB_SIZE, generator=generator)


class ToyModel:
    """Sees of a node what tree attention would: its ancestors, by the mask."""

    def __init__(self, grower, num_reqs):
        self.grower = grower
        self.tokens = [{} for _ in range(num_reqs)]  # node -> token
        self.frontiers = []

    def first_logits(self):
        return torch.stack([toy_logits(req, ()) for req in range(len(self.tokens))])

    def __call__(self, frontier):
        self.frontiers.append(frontier)
        batch, rows = self.grower.batch, []
        for req, token_ids in enumerate(frontier.token_ids.tolist()):
            for row, token in enumerate(token_ids):
                node = frontier.first_node + row
                self.tokens[req][node] = token
                seen = [
                    other
                    for other in range(self.grower.max_num_nodes)
                    if int(batch.masks[req, node, other // 32]) >> other % 32 & 1
                ]
                assert seen[0] == 0 and seen[-1] == node
                assert int(batch.depths[req, node]) == frontier.depth == len(seen) - 1
                rows.append(
                    toy_logits(req, tuple(self.tokens[req][n] for n in seen[1:]))
                )
            assert int(batch.num_nodes[req]) == frontier.first_node + len(token_ids)
        return torch.stack(rows)


def grow(shape, num_reqs=3, max_candidates=64, roots=None, max_len=1000, active=None):
    grower = TreeGrower(shape, num_reqs + 1, CPU)
    model = ToyModel(grower, num_reqs)
    out = DeviceCandidates.allocate(1, num_reqs + 1, max_candidates, CPU).of(0)
    grower.grow(
        model.first_logits(),
        torch.full((num_reqs,), 7, dtype=torch.int32) if roots is None else roots,
        max_len,
        torch.ones(num_reqs, dtype=torch.bool) if active is None else active,
        torch.ones(num_reqs),
        model,
        out,
    )
    return out, model


def paths_of(out, req):
    """(path, score) of a request's candidates in their order."""
    paths = []
    for node in range(int(out.num_candidates[req])):
        parent = int(out.parents[req, node])
        assert parent < node
        above = paths[parent][0] if parent >= 0 else ()
        paths.append(
            ((*above, int(out.token_ids[req, node])), float(out.scores[req, node]))
        )
    return paths


def score_of(req, path):
    return sum(
        float(toy_logits(req, path[:place]).log_softmax(-1)[token])
        for place, token in enumerate(path)
    )


def children_of(req, path, count):
    return [
        (*path, token) for token in toy_logits(req, path).topk(count).indices.tolist()
    ]


def level_beam(req, depth, width, num_children):
    """The best-first tree, spelled out."""
    frontier, pool = [()], []
    for _ in range(depth):
        children = [
            child for path in frontier for child in children_of(req, path, num_children)
        ]
        pool += children
        frontier = sorted(children, key=lambda path: -score_of(req, path))[:width]
    return sorted(pool, key=lambda path: -score_of(req, path))


@pytest.mark.parametrize(
    ("depth", "width", "num_children", "max_candidates"),
    [(1, 1, 1, 8), (4, 1, 1, 8), (3, 4, 3, 10), (4, 3, 5, 200), (5, 9, 2, 33)],
)
def test_best_first_expands_the_best_paths_of_each_level(
    depth, width, num_children, max_candidates
):
    shape = BestFirst(depth=depth, width=width, num_children=num_children, device=CPU)
    out, _ = grow(shape, max_candidates=max_candidates)
    for req in range(3):
        expected = level_beam(req, depth, width, num_children)[:max_candidates]
        found = paths_of(out, req)
        assert [path for path, _ in found] == expected
        for path, score in found:
            assert math.isclose(score, score_of(req, path), abs_tol=1e-4)


def test_a_tree_of_more_than_32_nodes_sees_its_ancestors_in_every_word():
    shape = BestFirst(depth=5, width=14, num_children=14, device=CPU)
    out, model = grow(shape, max_candidates=500)
    assert model.grower.batch.masks.shape[2] == 2
    for req in range(3):
        expected = level_beam(req, 5, 14, 14)[:500]
        assert [path for path, _ in paths_of(out, req)] == expected


def test_a_fixed_shape_draws_its_children_by_rank():
    #      root -> rank 0 -> ranks 0 and 2; rank 1 -> nothing; rank 3 -> rank 0 -> rank 1
    template = TreeTemplate(
        parents=(-1, -1, -1, -1, 0, 0, 0, 3, 7, 7), ranks=(0, 1, 2, 3, 0, 1, 2, 0, 0, 1)
    )
    out, model = grow(FixedShape(template, CPU))
    for req in range(3):
        top = children_of(req, (), 4)
        second = [*children_of(req, top[0], 3), *children_of(req, top[3], 1)]
        expected = {*top, *second, *children_of(req, second[3], 2)}
        assert {path for path, _ in paths_of(out, req)} == expected
    assert [each.token_ids.shape[1] for each in model.frontiers] == [2, 1]


def test_branching_gives_every_node_of_a_level_as_many_children():
    template = TreeTemplate.from_branching([3, 2, 1])
    out, _ = grow(FixedShape(template, CPU))
    lengths = [len(path) for path, _ in paths_of(out, 0)]
    assert sorted(lengths) == [1] * 3 + [2] * 6 + [3] * 6


def test_levels_without_room_in_the_cache_are_not_drafted():
    shape = BestFirst(depth=4, width=2, num_children=3, device=CPU)
    # A level needs the root's place, then two more per level: 1, 3, 5, 7.
    roots = torch.tensor([93, 94, 95, 98, 99, 100], dtype=torch.int32)
    out, model = grow(shape, num_reqs=6, roots=roots, max_len=100)
    depths = [
        max((len(p) for p, _ in paths_of(out, req)), default=0) for req in range(6)
    ]
    assert depths == [4, 3, 3, 1, 1, 0]
    in_range = [each.in_range.tolist() for each in model.frontiers]
    assert in_range == [
        [True, True, True, False, False, False],
        [True, True, True, False, False, False],
        [True, False, False, False, False, False],
    ]


def test_an_inactive_request_gets_no_candidates():
    shape = BestFirst(depth=3, width=2, num_children=2, device=CPU)
    out, model = grow(shape, active=torch.tensor([True, False, True]))
    assert (out.num_candidates[:3] > 0).tolist() == [True, False, True]
    assert not any(bool(each.in_range[1]) for each in model.frontiers)


def test_a_draft_that_says_nonsense_loses_its_candidates_only():
    shape = BestFirst(depth=2, width=2, num_children=2, device=CPU)
    grower = TreeGrower(shape, 2, CPU)
    out = DeviceCandidates.allocate(1, 2, 8, CPU).of(0)
    logits = torch.stack([toy_logits(0, ()), torch.full((VOCAB_SIZE,), torch.nan)])
    grower.grow(
        logits,
        torch.zeros(2, dtype=torch.int32),
        100,
        torch.ones(2, dtype=torch.bool),
        torch.ones(2),
        lambda frontier: logits.repeat_interleave(frontier.token_ids.shape[1], 0),
        out,
    )
    assert out.num_candidates.tolist() == [6, 0]


@pytest.mark.parametrize("fixed", [False, True])
def test_growing_never_asks_what_is_on_the_device(fixed):
    """Fake tensors have no values: reading one raises."""
    with FakeTensorMode():
        if fixed:
            shape = FixedShape(TreeTemplate.from_branching([3, 2, 2]), CPU)
        else:
            shape = BestFirst(depth=4, width=5, num_children=3, device=CPU)
        grower = TreeGrower(shape, 4, CPU)
        out = DeviceCandidates.allocate(1, 4, 16, CPU).of(0)
        grower.grow(
            torch.randn(3, VOCAB_SIZE),
            torch.zeros(3, dtype=torch.int32),
            100,
            torch.ones(3, dtype=torch.bool),
            torch.ones(3),
            lambda frontier: torch.randn(frontier.token_ids.numel(), VOCAB_SIZE),
            out,
        )


def test_a_request_stops_where_its_rows_are_too_unlikely():
    """By the draft's own account; the others go on."""
    shape = BestFirst(depth=4, width=2, num_children=3, device=CPU)
    free, _ = grow(shape, num_reqs=6)
    reach = torch.tensor(0.3)
    grower = TreeGrower(shape, 7, CPU, min_reach=reach)
    model = ToyModel(grower, 6)
    out = DeviceCandidates.allocate(1, 7, 64, CPU).of(0)
    grower.grow(
        model.first_logits(),
        torch.full((6,), 7, dtype=torch.int32),
        1000,
        torch.ones(6, dtype=torch.bool),
        torch.ones(6),
        model,
        out,
    )
    depths = []
    for req in range(6):
        paths = paths_of(out, req)
        depths.append(max(len(path) for path, _ in paths))
        expected = [each for each in paths_of(free, req) if len(each[0]) <= depths[-1]]
        assert paths == expected
        for depth in range(1, depths[-1]):
            rows = sorted(
                (score for path, score in paths if len(path) == depth), reverse=True
            )[:2]
            assert sum(math.exp(score) for score in rows) >= 0.3 - 1e-6
        if depths[-1] < 4:
            rows = sorted(
                (score for path, score in paths if len(path) == depths[-1]),
                reverse=True,
            )[:2]
            assert sum(math.exp(score) for score in rows) < 0.3
    assert len(set(depths)) > 1
    assert depths == grower.num_levels[:6].tolist()
    assert grower.goes_on(max(depths) - 2)
    assert not grower.goes_on(max(depths) - 1)


KERNELS = choose_kernels(TreeSpecConfig(kernels="torch"), CPU)


def draw(shape, is_drawn, seeds, max_candidates=64, *, mixes=False):
    """Grow with some requests drawing; also returns the kept distributions."""
    num_reqs = len(is_drawn)
    grower = TreeGrower(shape, num_reqs + 1, CPU)
    drawing = Drawing.allocate(
        KERNELS,
        max_num_reqs=num_reqs + 1,
        num_blocks=num_reqs + 1,
        max_num_nodes=grower.max_num_nodes,
        vocab_size=VOCAB_SIZE,
        dtype=torch.float32,
        device=CPU,
    )
    drawing.is_drawn[:num_reqs] = torch.tensor(is_drawn)
    drawing.is_mixed[:num_reqs] = drawing.is_drawn[:num_reqs] & mixes
    drawing.temperatures[:num_reqs] = torch.where(drawing.is_drawn[:num_reqs], 0.8, 1.0)
    drawing.seeds[:num_reqs] = torch.tensor(seeds)
    # Blocks in another order than rows, as slots are.
    drawing.blocks[:num_reqs] = torch.arange(num_reqs).flip(0) * grower.max_num_nodes
    model = ToyModel(grower, num_reqs)
    out = DeviceCandidates.allocate(1, num_reqs + 1, max_candidates, CPU).of(0)
    grower.grow(
        model.first_logits(),
        torch.full((num_reqs,), 7, dtype=torch.int32),
        1000,
        torch.ones(num_reqs, dtype=torch.bool),
        torch.ones(num_reqs),
        model,
        out,
        drawing,
    )
    return out, grower, drawing


#      root -> 3 children, the first of them -> 2, the second -> 1; ...
PLAN = TreeTemplate(parents=(-1, -1, -1, 0, 0, 1, 3), ranks=(0, 1, 2, 0, 1, 0, 0))


def planned_shape():
    return BestFirst(depth=3, width=3, num_children=4, device=CPU, drawn=PLAN)


def test_drawn_trees_are_the_planned_ones_whatever_is_drawn():
    """What is kept must not depend on what was drawn."""
    for seed in range(20):
        out, _, _ = draw(planned_shape(), [True], [seed])
        assert out.parents[0, : int(out.num_candidates[0])].tolist() == [*PLAN.parents]


def test_a_plan_that_does_not_fit_is_cut_to_what_does():
    shape = BestFirst(depth=2, width=1, num_children=2, device=CPU, drawn=PLAN)
    out, _, _ = draw(shape, [True], [1])
    assert out.parents[0, : int(out.num_candidates[0])].tolist() == [-1, -1, 0, 0]


def test_drawn_children_keep_their_order_of_drawing():
    """Not that of their probabilities: a rule tries them in the order of drawing."""
    orders = []
    for seed in range(30):
        out, _, _ = draw(planned_shape(), [True], [seed])
        scores = [score for _, score in paths_of(out, 0)][:3]
        orders.append(scores == sorted(scores, reverse=True))
    assert 0 < sum(orders) < len(orders)


def test_requests_beside_one_that_draws_get_their_likeliest_children():
    alone, _ = grow(planned_shape(), num_reqs=3)
    beside, _, _ = draw(planned_shape(), [False, True, False], [1, 2, 3])
    for req in (0, 2):
        assert paths_of(alone, req) == paths_of(beside, req)


def test_what_a_request_draws_depends_on_its_seed_alone():
    one, _, _ = draw(planned_shape(), [True, True, True], [5, 6, 7])
    other, _, _ = draw(planned_shape(), [True, False, True], [5, 0, 8])
    assert paths_of(one, 0) == paths_of(other, 0)
    assert paths_of(one, 2) != paths_of(other, 2)


def test_every_expanded_node_finds_the_distribution_its_children_came_from():
    out, grower, drawing = draw(planned_shape(), [True, True], [1, 2])
    for req in range(2):
        block = int(drawing.blocks[req])
        assert torch.equal(drawing.logits[block], toy_logits(req, ()))
        paths = paths_of(out, req)
        parents = out.parents[req].tolist()
        for place, (path, _) in enumerate(paths):
            row = int(grower.nodes[req, place])
            if row >= 0:
                kept = drawing.logits[block + row]
                assert torch.equal(kept, toy_logits(req, path))
            else:
                assert place not in parents[: len(paths)]


def test_a_node_that_mixes_has_its_likeliest_children_and_one_from_the_rest():
    shape, seen = BestFirst(depth=2, width=2, num_children=3, device=CPU), set()
    for seed in range(20):
        out, grower, _ = draw(shape, [True], [seed], mixes=True)
        paths = paths_of(out, 0)
        drawn = grower.drawn[0, : len(paths)].tolist()
        for parent in {path[:-1] for path, _ in paths}:
            probabilities = toy_logits(0, parent).softmax(-1)
            likeliest = probabilities.topk(2).indices.tolist()
            here = [
                (path[-1], score, is_drawn)
                for (path, score), is_drawn in zip(paths, drawn, strict=True)
                if path[:-1] == parent
            ]
            assert {token for token, _, is_drawn in here if not is_drawn} <= {
                *likeliest
            }
            # Kept or not by what the others leave, not by what was drawn.
            rest = float(1 - probabilities[likeliest].sum())
            above = dict(paths).get(parent, 0.0)
            for token, score, is_drawn in here:
                if is_drawn:
                    assert token not in likeliest
                    assert score == pytest.approx(above + math.log(rest), abs=1e-4)
                    seen.add(token)
    assert len(seen) > 3


def test_what_a_mixing_node_drew_from_has_lost_the_likeliest():
    shape = BestFirst(depth=2, width=2, num_children=3, device=CPU)
    _, _, drawing = draw(shape, [True], [1], mixes=True)
    kept, logits = drawing.logits[int(drawing.blocks[0])], toy_logits(0, ())
    likeliest = logits.topk(2).indices
    assert kept[likeliest].tolist() == [-torch.inf] * 2
    kept[likeliest] = logits[likeliest]
    assert torch.equal(kept, logits)


def test_a_mixed_tree_leaves_room_for_other_proposers_as_a_planned_one_does():
    out, _, _ = draw(planned_shape(), [True, True], [1, 2], mixes=True)
    assert out.num_candidates[:2].tolist() == [len(PLAN.parents)] * 2


@pytest.mark.parametrize("rule", [recursive_rejection, traversal])
@pytest.mark.parametrize("max_candidates", [3, 5, 12])
def test_mixed_trees_are_lossless_whichever_of_their_nodes_are_kept(
    rule, max_candidates
):
    """Every draw and every decision, with the grower's own choice of nodes."""
    vocab_size, num_tokens, temperature = 4, 3, 0.8
    gen = torch.Generator().manual_seed(5)
    draft = torch.randn(vocab_size + 1, vocab_size, generator=gen) * 1.5
    target = torch.randn(vocab_size + 1, vocab_size, generator=gen).double().softmax(1)
    goal = joint(
        lambda context: target[context[-1] if context else -1].numpy(),
        vocab_size,
        num_tokens,
    )
    shape = BestFirst(depth=2, width=2, num_children=2, device=CPU)
    grower = TreeGrower(shape, 1, CPU)
    drawing = Drawing.allocate(
        SimpleNamespace(perturb_logits=None),
        max_num_reqs=1,
        num_blocks=1,
        max_num_nodes=grower.max_num_nodes,
        vocab_size=vocab_size,
        dtype=torch.float32,
        device=CPU,
    )
    drawing.is_drawn[0] = drawing.is_mixed[0] = True
    drawing.temperatures[0] = temperature
    out = DeviceCandidates.allocate(1, 1, max_candidates, CPU).of(0)
    found, outcomes = np.zeros_like(goal), Outcomes()

    def draw_each_row(logits, temperatures, seeds, positions, drawn, first, keys):
        keys.zero_()
        for row, rest in enumerate((logits / temperature).double().softmax(-1)):
            keys[row, outcomes.choose(rest.numpy())] = 1

    drawing.kernels.perturb_logits = draw_each_row
    while True:
        grower.grow(
            draft[-1:],
            torch.zeros(1, dtype=torch.int32),
            100,
            torch.ones(1, dtype=torch.bool),
            torch.ones(1),
            lambda frontier: draft[frontier.token_ids[0].long()],
            out,
            drawing,
        )
        count = int(out.num_candidates[0])
        tokens = out.token_ids[0, :count].tolist()
        tree = BatchTree(
            [-1, *(out.parents[0, :count] + 1).tolist()],
            [-1, *tokens],
            [0, *grower.drawn[0, :count].int().tolist()],
            [0, *grower.nodes[0, :count].tolist()],
            target[torch.tensor([-1, *tokens])].log(),
            drawing.logits,
            temperature,
        )
        _, emitted = rule(tree, outcomes)
        known = tuple(emitted[:num_tokens])
        found[known] += outcomes.probability * goal[known] / goal[known].sum()
        if not outcomes.next():
            break
    assert total_variation(found, goal) < 1e-6
