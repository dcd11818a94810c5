"""The three kernels that verify drawn children against their references."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch

from vllm_treespec.kernels import residuals
from vllm_treespec.kernels.reference.walk_iid import walk_iid as reference_iid
from vllm_treespec.kernels.reference.walk_traversal import (
    walk_traversal as reference_traversal,
)
from vllm_treespec.kernels.reference.walk_without_replacement import (
    walk_without_replacement as reference_without_replacement,
)
from vllm_treespec.kernels.walk_iid import walk_iid
from vllm_treespec.kernels.walk_traversal import walk_traversal
from vllm_treespec.kernels.walk_without_replacement import walk_without_replacement
from vllm_treespec.testing.trees import chain_parents, random_parents

STALE = -7
INF = float("inf")
Rule = Callable[..., None]
TWINS = {
    walk_without_replacement: reference_without_replacement,
    walk_iid: reference_iid,
    walk_traversal: reference_traversal,
}
every_rule = pytest.mark.parametrize(
    "rule", TWINS, ids=["without_replacement", "iid", "traversal"]
)


@dataclass
class Batch:
    """Arguments by name, in the kernels' order."""

    slots: torch.Tensor
    cu_num_logits: torch.Tensor
    target_logits: torch.Tensor
    draft_logits: torch.Tensor
    sources: torch.Tensor
    drawn: torch.Tensor
    temperatures: torch.Tensor
    token_ids: torch.Tensor
    parents: torch.Tensor
    num_nodes: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        tensors = {name: tensor.to(device) for name, tensor in vars(self).items()}
        return Batch(**tensors)


class Walk(NamedTuple):
    sampled: torch.Tensor
    num_sampled: torch.Tensor
    path_nodes: torch.Tensor
    path_lengths: torch.Tensor


def run(rule: Rule, batch: Batch, num_rows: int | None = None) -> Walk:
    num_rows = num_rows or len(batch.slots)
    shape, device = (num_rows, batch.parents.shape[1]), batch.parents.device
    counts = torch.full((num_rows,), STALE, dtype=torch.int32, device=device)
    nodes = torch.full(shape, STALE, dtype=torch.int32, device=device)
    walk = Walk(nodes.long(), counts, nodes, counts.clone())
    rule(*vars(batch).values(), *walk)
    return walk


def check(rule: Rule, batch: Batch) -> Walk:
    """What the kernel and its reference agree on; rows past the batch stay stale."""
    num_rows = len(batch.slots) + 2
    walk = run(rule, batch, num_rows)
    expected = run(TWINS[rule], batch, num_rows)
    torch.testing.assert_close(tuple(walk), tuple(expected), rtol=0, atol=0)
    assert (walk.num_sampled[-2:] == STALE).all()
    return walk


def random_batch(
    parents: torch.Tensor,  # [num_slots, num_nodes]
    vocab_size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    drawn_share: float = 0.75,
) -> Batch:
    """Rows that are cut, padded, empty and in no order. Nodes that do not count look
    like any others, but their logits are NaN."""
    gen = torch.Generator().manual_seed(seed)
    num_slots, max_num_nodes = parents.shape
    num_reqs = num_slots - 2
    num_row_nodes = torch.randint(0, max_num_nodes + 3, (num_reqs,), generator=gen)
    num_row_nodes[:2] = torch.tensor([0, max_num_nodes])
    num_nodes = torch.randint(0, max_num_nodes + 1, (num_slots,), generator=gen)
    num_nodes[torch.rand(num_slots, generator=gen) < 0.5] = max_num_nodes
    cu_num_logits = torch.cat([torch.zeros(1), num_row_nodes.cumsum(0)]).int()
    slots = torch.randperm(num_slots, generator=gen)[:num_reqs]

    def logits(num_rows: int) -> torch.Tensor:
        values = 1.5 * torch.randn(num_rows, vocab_size, generator=gen)
        values[torch.rand(values.shape, generator=gen) < 0.2] = -INF
        values[:, torch.randint(vocab_size, (1,), generator=gen)] = 0.5
        return values

    target_logits = logits(int(cu_num_logits[-1]))
    sources = torch.randperm(num_slots * max_num_nodes, generator=gen)
    sources = sources.view(parents.shape).int()
    sources[torch.rand(parents.shape, generator=gen) < 0.15] = -1
    draft_logits = logits(sources.numel())
    # tokens that both sides like, so that walks get somewhere
    token_ids = torch.randint(min(vocab_size, 4), parents.shape, generator=gen).int()
    drawn = (torch.rand(parents.shape, generator=gen) < drawn_share).int()
    unread = torch.ones(len(draft_logits), dtype=torch.bool)
    for row, slot in enumerate(slots.tolist()):
        first, end = cu_num_logits[row : row + 2].tolist()
        usable = max(min(end - first, int(num_nodes[slot])), 1)
        target_logits[first + usable : end] = torch.nan
        used = sources[slot, :usable]
        unread[used[used >= 0].long()] = False
    draft_logits[unread] = torch.nan
    temperatures = torch.rand(num_slots, generator=gen) + 0.3
    temperatures[0] = 0.3
    return Batch(
        slots=slots,
        cu_num_logits=cu_num_logits,
        target_logits=target_logits,
        draft_logits=draft_logits.to(dtype),
        sources=sources,
        drawn=drawn,
        temperatures=temperatures,
        token_ids=token_ids,
        parents=parents,
        num_nodes=num_nodes.int(),
        seeds=torch.randint(-(2**63), 2**63 - 1, (num_slots,), generator=gen),
        positions=torch.randint(0, 2**20, (num_reqs,), generator=gen),
    )


@pytest.mark.parametrize(
    ("vocab_size", "max_num_nodes", "dtype"),
    [
        (1, 5, torch.float32),
        (2, 1, torch.float32),
        (3, 9, torch.bfloat16),
        (7, 12, torch.float16),
        (33, 33, torch.float32),
    ],
)
@every_rule
def test_matches_reference(
    rule: Rule,
    vocab_size: int,
    max_num_nodes: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
):
    # all requests in one program, then many small tiles and blocks of the vocabulary
    parents = random_parents(34, max_num_nodes)
    batch = random_batch(parents, vocab_size, max_num_nodes, dtype).to(device)
    whole = check(rule, batch)
    if device.type == "cpu":
        monkeypatch.setattr(residuals, "TILE_SIZE", 16)
        few = replace(batch, slots=batch.slots[:6].contiguous())
        few.positions = few.positions[:6].contiguous()
        for part, all_of_it in zip(check(rule, few), whole, strict=True):
            assert torch.equal(part[:6], all_of_it[:6])


@every_rule
def test_matches_reference_on_chains(rule: Rule, device: torch.device):
    batch = random_batch(chain_parents(40, 7), 3, 1, drawn_share=0.9)
    walk = check(rule, batch.to(device))
    assert walk.path_lengths[:-2].max() >= 3, "no chain got far"


@every_rule
def test_matches_reference_on_a_vocabulary_of_several_blocks(
    rule: Rule, device: torch.device
):
    batch = random_batch(random_parents(6, 6), 9001, 2, torch.bfloat16)
    check(rule, batch.to(device))


@every_rule
def test_target_logits_may_have_wider_rows(rule: Rule, device: torch.device):
    batch = random_batch(random_parents(10, 6), 5, 3)
    expected = run(rule, batch.to(device))
    wide = torch.full((len(batch.target_logits), 9), INF)
    wide[:, :5] = batch.target_logits
    walk = run(rule, replace(batch, target_logits=wide[:, :5]).to(device))
    torch.testing.assert_close(tuple(walk), tuple(expected), rtol=0, atol=0)


@every_rule
def test_a_request_does_not_depend_on_its_batch(rule: Rule, device: torch.device):
    batch = random_batch(random_parents(14, 8), 4, 4)
    together = run(rule, batch.to(device))
    for row in range(0, len(batch.slots), 3):
        first, end = batch.cu_num_logits[row : row + 2].tolist()
        alone = replace(
            batch,
            slots=batch.slots[row : row + 1],
            positions=batch.positions[row : row + 1],
            cu_num_logits=torch.tensor([0, end - first], dtype=torch.int32),
            target_logits=batch.target_logits[first:end],
        )
        for one, many in zip(run(rule, alone.to(device)), together, strict=True):
            assert torch.equal(one[0], many[row])


def one_request(
    parents: list[int],
    token_ids: list[int],
    drawn: list[int],
    target: list[list[float]],  # probabilities, per node
    draft: list[list[float]],
    num_reqs: int = 64,
) -> Batch:
    """The same tree for many seeds."""
    num_nodes = len(parents)

    def per_slot(values: list[int]) -> torch.Tensor:
        return torch.tensor([values] * num_reqs, dtype=torch.int32)

    return Batch(
        slots=torch.arange(num_reqs),
        cu_num_logits=torch.arange(num_reqs + 1, dtype=torch.int32) * num_nodes,
        target_logits=torch.tensor(target).log().repeat(num_reqs, 1),
        draft_logits=torch.tensor(draft).log(),
        sources=per_slot(list(range(num_nodes))),
        drawn=per_slot(drawn),
        temperatures=torch.ones(num_reqs),
        token_ids=per_slot(token_ids),
        parents=per_slot(parents),
        num_nodes=torch.full((num_reqs,), num_nodes, dtype=torch.int32),
        seeds=torch.arange(num_reqs),
        positions=torch.full((num_reqs,), 100),
    )


@every_rule
def test_a_draw_that_the_target_likes_more_is_always_accepted(
    rule: Rule, device: torch.device
):
    #  root -- 1: 0 -- 2: 1, each twice as likely by the target
    batch = one_request(
        [-1, 0, 1],
        [9, 0, 1],
        [0, 1, 1],
        [[0.8, 0.2, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]],
        [[0.4, 0.2, 0.4], [0.3, 0.4, 0.3], [1.0, 0.0, 0.0]],
    )
    walk = check(rule, batch.to(device))
    assert walk.sampled[:64].tolist() == [[0, 1, 2]] * 64


@every_rule
def test_a_draw_that_the_target_excludes_is_never_accepted(
    rule: Rule, device: torch.device
):
    #  root -- 1: 0, impossible for the target; 2: 1, fixed, the only possible one
    batch = one_request(
        [-1, 0, 0],
        [9, 0, 1],
        [0, 1, 0],
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]],
        [[0.9, 0.1, 0.0]] * 3,
    )
    walk = check(rule, batch.to(device))
    assert walk.sampled[:64].tolist() == [[1, 2, 0]] * 64
    assert walk.path_nodes[:64].tolist() == [[0, 2, 0]] * 64


@every_rule
def test_draws_below_a_fixed_child_are_verified_too(rule: Rule, device: torch.device):
    #  root -- 1: 1, fixed -- 2: 0, drawn, and four times as likely by the target
    batch = one_request(
        [-1, 0, 1],
        [9, 1, 0],
        [0, 0, 1],
        [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]],
        [[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]],
    )
    walk = check(rule, batch.to(device))
    assert walk.sampled[:64].tolist() == [[1, 0, 1]] * 64


@every_rule
def test_the_same_distributions_accept_every_draw(rule: Rule, device: torch.device):
    """The residual has no mass then, and nothing may be sampled from it."""
    gen = torch.Generator().manual_seed(0)
    same = torch.rand(1, 200, generator=gen).softmax(-1).tolist()
    batch = one_request([-1, 0, 1], [9, 50, 60], [0, 1, 1], same * 3, same * 3)
    walk = run(rule, batch.to(device))
    assert walk.path_lengths.float().mean() > 1.9


@every_rule
def test_a_draw_of_no_probability_is_no_child(rule: Rule, device: torch.device):
    """Else the target's 0.5 would be divided by nothing, and always be accepted."""
    batch = one_request(
        [-1, 0], [9, 0], [0, 1], [[0.5, 0.5], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]
    )
    walk = check(rule, batch.to(device))
    assert (walk.path_lengths[:64] == 0).all()
    assert set(walk.sampled[:64, 0].tolist()) == {0, 1}


@every_rule
def test_a_repetition_is_turned_down_as_often_as_its_rule_says(
    rule: Rule, device: torch.device
):
    """It counts for independent draws only; what is left for node 3 shows which."""
    batch = one_request(
        [-1, 0, 0, 0],
        [9, 0, 0, 1],
        [0, 1, 1, 1],
        [[0.1, 0.5, 0.4]] * 4,
        [[0.4, 0.4, 0.2]] * 4,
        num_reqs=500,
    )
    check(rule, batch.to(device))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@every_rule
def test_logits_that_are_no_distribution_end_the_walk(rule: Rule, device: torch.device):
    for junk in (-INF, torch.nan):
        batch = one_request(
            [-1, 0, 0], [9, 0, 1], [0, 1, 0], [[0.5, 0.5]] * 3, [[0.5, 0.5]] * 3
        )
        batch.target_logits[:] = junk
        walk = run(rule, batch.to(device))
        assert ((walk.sampled >= 0) & (walk.sampled < 2)).all()
        assert (walk.num_sampled >= 1).all()


@every_rule
def test_an_empty_batch_is_left_alone(rule: Rule, device: torch.device):
    batch = one_request([-1], [9], [0], [[1.0]], [[1.0]], num_reqs=1)
    batch.slots, batch.positions = batch.slots[:0], batch.positions[:0]
    assert (run(rule, batch.to(device), 2).num_sampled == STALE).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("drawn", lambda t: t[:, :-1], "one shape"),
        ("draft_logits", lambda t: t[:, :-1], "one vocabulary"),
        ("cu_num_logits", lambda t: t[:-1], "prefix sums"),
        ("positions", lambda t: t[:-1], "rows"),
        ("parents", lambda t: t.T.contiguous().T, "contiguous"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    name: str, change: Callable, message: str, device: torch.device
):
    batch = random_batch(random_parents(6, 5), 4, 0).to(device)
    setattr(batch, name, change(getattr(batch, name)))
    with pytest.raises(ValueError, match=message):
        run(walk_traversal, batch)
