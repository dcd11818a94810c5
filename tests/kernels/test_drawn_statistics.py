"""What the kernels of the drawn rules emit has the target's distribution, counted.

Trees are drawn anew for every request and step, over a Markov chain of a few tokens,
and a request takes steps until it has emitted enough: its next step starts where its
last one ended, under the same seed.
"""

import os
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from vllm_treespec.kernels import residuals
from vllm_treespec.kernels.walk_iid import walk_iid
from vllm_treespec.kernels.walk_traversal import walk_traversal
from vllm_treespec.kernels.walk_without_replacement import walk_without_replacement

Array = np.ndarray
VOCAB_SIZE = 4
TEMPERATURE = 0.7
NUM_TOKENS = 3
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# They emit three tokens each, in about two steps of six draws.
NUM_REQS = 1 << 17
# Of so many requests; the interpreter takes as long for one as compiled kernels for all.
NUM_BATCHES = 1 if INTERPRETED else 4
# How often a correct rule fails here, had the seeds not been fixed.
FALSE_ALARM = 1e-6

#              root
#         /      |      \
#     1 drawn  2 drawn   3 fixed
#      /   \             |
#   4 dr.   5 drawn    6 drawn
#     |
#   7 drawn
PARENTS = np.array([-1, 0, 0, 0, 1, 1, 3, 4])
DRAWN = np.array([0, 1, 1, 0, 1, 1, 1, 1])
FIXED_TOKEN = 2


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Chain:
    """A target and a draft that look at one token back."""

    def __init__(self, seed: int) -> None:
        gen = np.random.default_rng(seed)
        shape = (VOCAB_SIZE, VOCAB_SIZE)
        self.target_logits = gen.normal(scale=1.2, size=shape).astype(np.float32)
        self.target_logits[1, 3] = -np.inf
        logits = TEMPERATURE * gen.normal(scale=1.2, size=shape)
        self.draft_logits = torch.tensor(logits).bfloat16()
        self.target = softmax(self.target_logits.astype(np.float64))
        self.draft = softmax(self.draft_logits.double().numpy() / TEMPERATURE)

    def expected(self, first: int) -> Array:
        """[VOCAB_SIZE ** NUM_TOKENS], the distribution behind one token."""
        result = []
        for tokens in product(range(VOCAB_SIZE), repeat=NUM_TOKENS):
            before = (first, *tokens)[:-1]
            result.append(np.prod(self.target[list(before), list(tokens)]))
        return np.array(result)


def draw_trees(
    gen: np.random.Generator, chain: Chain, roots: Array, replace: bool
) -> Array:
    """[num_reqs, nodes], every node's token; fixed ones do not depend on chance."""
    tokens = np.full((len(roots), len(PARENTS)), FIXED_TOKEN)
    tokens[:, 0] = roots
    for parent in range(len(PARENTS)):
        children = np.flatnonzero((parent == PARENTS) & (DRAWN == 1))
        draft = chain.draft[tokens[:, parent]]
        if replace:
            numbers = gen.random((len(roots), len(children), 1))
            sums = draft.cumsum(1)[:, None]
            tokens[:, children] = (numbers > sums[..., :-1]).sum(-1)
        else:
            noisy = np.log(draft) + gen.gumbel(size=draft.shape)
            tokens[:, children] = np.argsort(-noisy, axis=1)[:, : len(children)]
    return tokens


def step(
    walk: Callable[..., None],
    chain: Chain,
    tokens: Array,  # [num_reqs, nodes]
    seeds: Array,  # [num_reqs]
    positions: Array,  # [num_reqs]
) -> tuple[Array, Array]:
    num_reqs, num_nodes = tokens.shape

    def per_slot(values: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int32))

    has_draws = np.isin(np.arange(num_nodes), PARENTS[DRAWN == 1])
    sampled = torch.empty(num_reqs, num_nodes, dtype=torch.int64)
    num_sampled = torch.empty(num_reqs, dtype=torch.int32)
    walk(
        torch.arange(num_reqs),
        torch.arange(num_reqs + 1, dtype=torch.int32) * num_nodes,
        torch.from_numpy(chain.target_logits[tokens.ravel()]),
        chain.draft_logits,
        per_slot(np.where(has_draws, tokens, -1)),
        per_slot(np.broadcast_to(DRAWN, tokens.shape)),
        torch.full((num_reqs,), TEMPERATURE),
        per_slot(tokens),
        per_slot(np.broadcast_to(PARENTS, tokens.shape)),
        torch.full((num_reqs,), num_nodes, dtype=torch.int32),
        torch.from_numpy(seeds),
        torch.from_numpy(positions),
        sampled,
        num_sampled,
        torch.empty(num_reqs, num_nodes, dtype=torch.int32),
        torch.empty(num_reqs, dtype=torch.int32),
    )
    return sampled.numpy(), num_sampled.numpy()


def count(
    walk: Callable[..., None], replace: bool, num_batches: int = 1
) -> tuple[Array, Array]:
    """How often every sequence was emitted, and how often it should have been."""
    chain, gen = Chain(seed=0), np.random.default_rng(1)
    counts = [
        count_batch(walk, chain, gen, replace, NUM_REQS * batch)
        for batch in range(num_batches)
    ]
    return np.sum(counts, 0), chain.expected(0) * NUM_REQS * num_batches


def count_batch(
    walk: Callable[..., None],
    chain: Chain,
    gen: np.random.Generator,
    replace: bool,
    first_seed: int,
) -> Array:
    # Column 0 is the token to start from, and what is past the end is cut off.
    texts = np.zeros((NUM_REQS, 1 + NUM_TOKENS), np.int64)
    lengths = np.ones(NUM_REQS, np.int64)
    seeds = np.arange(NUM_REQS) + first_seed
    while (open_reqs := np.flatnonzero(lengths <= NUM_TOKENS)).size:
        roots = texts[open_reqs, lengths[open_reqs] - 1]
        tokens = draw_trees(gen, chain, roots, replace)
        sampled, num_sampled = step(
            walk, chain, tokens, seeds[open_reqs], lengths[open_reqs]
        )
        for column in range(NUM_TOKENS):
            places = lengths[open_reqs] + column
            fits = (column < num_sampled) & (places <= NUM_TOKENS)
            texts[open_reqs[fits], places[fits]] = sampled[fits, column]
        lengths[open_reqs] += num_sampled
    base = VOCAB_SIZE ** np.arange(NUM_TOKENS)[::-1]
    return np.bincount(texts[:, 1:] @ base, minlength=VOCAB_SIZE**NUM_TOKENS)


def p_value(counts: Array, expected: Array) -> float:
    """Of Pearson's chi-square; a sequence that cannot be must not have been."""
    if counts[expected == 0].any():
        return 0.0
    possible = expected > 0
    assert expected[possible].min() > 20, "too rare for chi-square"
    surplus = counts[possible] - expected[possible]
    statistic = torch.tensor((surplus**2 / expected[possible]).sum() / 2)
    freedom = torch.tensor((possible.sum() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic))


RULES = [
    pytest.param(walk_without_replacement, False, id="without replacement"),
    pytest.param(walk_iid, True, id="iid"),
    pytest.param(walk_traversal, False, id="traversal"),
]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch):
    """A program of the interpreter costs the same however many requests it holds."""
    if torch.cuda.is_available():
        pytest.skip("trees are drawn on the CPU")
    if INTERPRETED:
        monkeypatch.setattr(residuals, "TILE_SIZE", 1 << 20)


@pytest.mark.parametrize(("walk", "replace"), RULES)
def test_emits_the_targets_distribution(walk: Callable[..., None], replace: bool):
    assert p_value(*count(walk, replace, NUM_BATCHES)) > FALSE_ALARM


def test_draws_of_the_wrong_kind_are_noticed():
    """Draws without replacement are not for the rule that expects independent ones."""
    assert p_value(*count(walk_iid, False)) < FALSE_ALARM


@triton.jit
def ones(
    target_logits_ptr, target_offsets, target_peak, target_scale, draft_logits_ptr,
    draft_offsets, draft_peak, draft_scale, temperatures, beta, token_ids, is_removed,
    nodes, wanted, vocab_size, BLOCK_NODES: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
):  # fmt: skip
    one = beta.to(tl.float64) * 0 + 1
    return one, one


def test_a_residual_that_is_not_normalised_is_noticed(monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["vllm_treespec.kernels.walk_without_replacement"]
    kernel = module._walk_down_kernel
    monkeypatch.setattr(module, "masses", ones)
    forget(kernel)
    try:
        assert p_value(*count(walk_without_replacement, False)) < FALSE_ALARM
    finally:
        forget(kernel)


def forget(kernel: Any) -> None:
    """What was compiled of a kernel whose functions are others now."""
    if not INTERPRETED:
        kernel.hash = None
        kernel.device_caches.clear()
