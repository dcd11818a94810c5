"""What the rules that verify drawn children share: uniform numbers, residuals, picks.

A node's target distribution is ``p``, its draft's is ``q``, both from logits. Rejecting
a drawn child replaces ``p`` by ``[r p - q]+`` (``r`` is 1 except in traversal), and
clipping twice is clipping once: after any number of rejections ``p`` is proportional
to ``[p - beta q]+`` for one growing number ``beta``. A residual is therefore two
numbers per node, ``beta`` and the mass that is left, and no copy of the vocabulary.

Everything is a tile: ``[BLOCK_REQS]`` vectors and ``[BLOCK_REQS, ...]`` matrices, with
``BLOCK_REQS`` 1 for vocabularies of any real size. Masses are summed in float64, within
a block of the vocabulary in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Keeps our numbers apart from any other use of the same seeds, such as vLLM's noise.
SEED_SALT = tl.constexpr(0x5EED_0F_7E57_ACC3)

# A larger beta would leave nothing that it does not already clip, but overflow.
MAX_BETA = tl.constexpr(1e30)

# Elements of the largest tile, a power of two.
TILE_SIZE = 4096


@triton.jit
def uniform(
    seeds,  # [BLOCK_REQS] int64
    positions,  # [BLOCK_REQS] int64, below 2**31
    uses,  # [BLOCK_REQS] int32, not negative, one per number that a step needs
):
    """[BLOCK_REQS] float64 in [0, 1) with 53 random bits."""
    counters = (positions << 32) | uses.to(tl.int64)
    high, low, _, _ = tl.randint4x(seeds ^ SEED_SALT, counters)
    high = (high.to(tl.uint32, bitcast=True) >> 5).to(tl.int64)
    low = (low.to(tl.uint32, bitcast=True) >> 6).to(tl.int64)
    return ((high << 26) | low).to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def at(tile, nodes, node):
    """[BLOCK_REQS], the column ``node[req]`` of every row, 0 where it is -1."""
    return tl.sum(tl.where(nodes[None, :] == node[:, None], tile, 0), axis=1)


@triton.jit
def put(tile, nodes, node, values, wanted):
    """The tile with a new value in column ``node[req]`` of every wanted row."""
    is_cell = wanted[:, None] & (nodes[None, :] == node[:, None])
    return tl.where(is_cell, values[:, None], tile)


@triton.jit
def any_of(mask):
    """Whether any element of a [BLOCK_REQS] mask is set, as a scalar."""
    return tl.max(mask.to(tl.int32), axis=0) > 0


@triton.jit
def next_node(is_candidate, nodes, after, BLOCK_NODES: tl.constexpr):
    """[BLOCK_REQS] int32, the first candidate behind ``after``, -1: there is none."""
    is_later = is_candidate & (nodes[None, :] > after[:, None])
    found = tl.min(tl.where(is_later, nodes[None, :], BLOCK_NODES), axis=1)
    return tl.where(found < BLOCK_NODES, found, -1)


@triton.jit
def softmax_terms(
    logits_ptr,
    offsets,  # [BLOCK_REQS] int64, of a row's first logit
    temperatures,  # [BLOCK_REQS] float32
    wanted,  # [BLOCK_REQS] bool, others get (0, 0): no mass anywhere
    vocab_size,
    BLOCK_VOCAB: tl.constexpr,
):
    """(peak, scale): ``probability = exp(logit / temperature - peak) * scale``."""
    peak = temperatures * 0 + float("-inf")
    total = temperatures.to(tl.float64) * 0
    for start in range(0, tl.where(any_of(wanted), vocab_size, 0), BLOCK_VOCAB):
        columns = start + tl.arange(0, BLOCK_VOCAB)
        logits = tl.load(
            logits_ptr + offsets[:, None] + columns[None, :],
            mask=wanted[:, None] & (columns < vocab_size)[None, :],
            other=float("-inf"),
        )
        logits = logits.to(tl.float32) / temperatures[:, None]
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        # Without a possible token so far, any finite base does.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        block = tl.sum(tl.exp(logits - base[:, None]), axis=1)
        total = total * tl.exp(peak - base).to(tl.float64) + block.to(tl.float64)
        peak = new_peak
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    scale = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    return peak, scale.to(tl.float32)


@triton.jit
def probability_of(logits_ptr, offsets, temperatures, peak, scale, token_ids, wanted):
    """[BLOCK_REQS] float32, the probability of one token per request."""
    logits = tl.load(logits_ptr + offsets + token_ids, mask=wanted, other=float("-inf"))
    return tl.exp(logits.to(tl.float32) / temperatures - peak) * scale


@triton.jit
def probabilities(
    logits_ptr, offsets, temperatures, peak, scale, columns, wanted, vocab_size
):
    """[BLOCK_REQS, BLOCK_VOCAB] float32, zero past the vocabulary."""
    logits = tl.load(
        logits_ptr + offsets[:, None] + columns[None, :],
        mask=wanted[:, None] & (columns < vocab_size)[None, :],
        other=float("-inf"),
    )
    scaled = logits.to(tl.float32) / temperatures[:, None] - peak[:, None]
    return tl.exp(scaled) * scale[:, None]


@triton.jit
def masses(
    target_logits_ptr,
    target_offsets,
    target_peak,
    target_scale,
    draft_logits_ptr,
    draft_offsets,
    draft_peak,
    draft_scale,
    temperatures,
    beta,  # [BLOCK_REQS] float64
    token_ids,  # [BLOCK_REQS, BLOCK_NODES] int32
    is_removed,  # [BLOCK_REQS, BLOCK_NODES] bool, draws that q has lost
    nodes,
    wanted,  # [BLOCK_REQS] bool, others get (0, 0)
    vocab_size,
    BLOCK_NODES: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
):
    """The mass of ``[p - beta q]+`` and that of ``q`` without the removed tokens.

    Both are summed, never subtracted: what is left can be small beside what is gone.
    """
    ones = temperatures * 0 + 1
    beta = beta.to(tl.float32)
    target_mass, draft_mass = beta.to(tl.float64) * 0, beta.to(tl.float64) * 0
    no_node = target_offsets.to(tl.int32) * 0 - 1
    for start in range(0, tl.where(any_of(wanted), vocab_size, 0), BLOCK_VOCAB):
        columns = start + tl.arange(0, BLOCK_VOCAB)
        p = probabilities(
            target_logits_ptr,
            target_offsets,
            ones,
            target_peak,
            target_scale,
            columns,
            wanted,
            vocab_size,
        )
        q = probabilities(
            draft_logits_ptr,
            draft_offsets,
            temperatures,
            draft_peak,
            draft_scale,
            columns,
            wanted,
            vocab_size,
        )
        residual = tl.maximum(p - beta[:, None] * q, 0.0)
        target_mass += tl.sum(residual, axis=1).to(tl.float64)
        removed = next_node(is_removed, nodes, no_node, BLOCK_NODES)
        while tl.max(removed, axis=0) >= 0:
            token = tl.where(removed >= 0, at(token_ids, nodes, removed), -1)
            q = tl.where(columns[None, :] == token[:, None], 0.0, q)
            # Behind the last one there is nothing to find: stay at -1.
            after = tl.where(removed >= 0, removed, BLOCK_NODES)
            removed = next_node(is_removed, nodes, after, BLOCK_NODES)
        draft_mass += tl.sum(q, axis=1).to(tl.float64)
    return target_mass, draft_mass


@triton.jit
def pick(
    target_logits_ptr,
    target_offsets,
    target_peak,
    target_scale,
    draft_logits_ptr,
    draft_offsets,
    draft_peak,
    draft_scale,
    temperatures,
    beta,  # [BLOCK_REQS] float64
    mass,  # [BLOCK_REQS] float64, of [p - beta q]+
    numbers,  # [BLOCK_REQS] float64, uniform
    has_draft,  # [BLOCK_REQS] bool, others have no q
    wanted,  # [BLOCK_REQS] bool, others get 0
    vocab_size,
    BLOCK_VOCAB: tl.constexpr,
):
    """[BLOCK_REQS] int32, a token drawn from ``[p - beta q]+``, by its inverse CDF.

    Where rounding left no mass at all the token comes from ``p``. Only tokens of
    positive weight are picked.
    """
    ones = temperatures * 0 + 1
    beta = tl.where(mass > 0, beta, 0.0).to(tl.float32)
    mass = tl.where(mass > 0, mass, 1.0)
    goal = numbers * mass
    passed = mass * 0
    picked = target_offsets.to(tl.int32) * 0 - 1
    last = picked
    start = tl.full((), 0, tl.int32)
    is_open = any_of(wanted)
    while is_open:
        columns = start + tl.arange(0, BLOCK_VOCAB)
        p = probabilities(
            target_logits_ptr,
            target_offsets,
            ones,
            target_peak,
            target_scale,
            columns,
            wanted,
            vocab_size,
        )
        q = probabilities(
            draft_logits_ptr,
            draft_offsets,
            temperatures,
            draft_peak,
            draft_scale,
            columns,
            wanted & has_draft,
            vocab_size,
        )
        weights = tl.maximum(p - beta[:, None] * q, 0.0)
        # Relative to the block, so that float32 resolves it wherever it lies.
        threshold = (goal - passed).to(tl.float32)
        is_hit = (tl.cumsum(weights, axis=1) > threshold[:, None]) & (weights > 0)
        first = tl.min(tl.where(is_hit, columns[None, :], 2147483647), axis=1)
        picked = tl.where((picked < 0) & (first < 2147483647), first, picked)
        possible = tl.max(tl.where(weights > 0, columns[None, :], -1), axis=1)
        last = tl.maximum(last, possible)
        passed += tl.sum(weights, axis=1).to(tl.float64)
        start += BLOCK_VOCAB
        is_open = (start < vocab_size) & any_of(wanted & (picked < 0))
    return tl.maximum(tl.where(picked >= 0, picked, last), 0)


@triton.jit
def load_rows(
    slots_ptr, cu_num_logits_ptr, num_nodes_ptr, num_reqs, BLOCK: tl.constexpr
):
    """Per request of the tile: its row, slot, first logits row, nodes in the batch and
    nodes of the tree among them. Rows past the batch have none."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_req = rows < num_reqs
    slots = tl.load(slots_ptr + rows, mask=is_req, other=0).to(tl.int64)
    first = tl.load(cu_num_logits_ptr + rows, mask=is_req, other=0).to(tl.int64)
    end = tl.load(cu_num_logits_ptr + rows + 1, mask=is_req, other=0).to(tl.int64)
    num_nodes = tl.load(num_nodes_ptr + slots, mask=is_req, other=0)
    usable = tl.minimum(end - first, num_nodes.to(tl.int64))
    return rows, slots, first, end - first, usable


@triton.jit
def store_paths(
    sampled_ptr,
    sampled,
    num_sampled_ptr,
    num_sampled,
    path_nodes_ptr,
    path,
    path_lengths_ptr,
    rows,
    nodes,
    num_reqs,
    max_num_nodes,
):
    is_req = rows < num_reqs
    cells = rows[:, None] * max_num_nodes + nodes[None, :]
    is_cell = is_req[:, None] & (nodes < max_num_nodes)[None, :]
    is_used = nodes[None, :] < num_sampled[:, None]
    tl.store(sampled_ptr + cells, tl.where(is_used, sampled, 0), mask=is_cell)
    tl.store(path_nodes_ptr + cells, tl.where(is_used, path, 0), mask=is_cell)
    tl.store(num_sampled_ptr + rows, num_sampled, mask=is_req)
    tl.store(path_lengths_ptr + rows, tl.maximum(num_sampled - 1, 0), mask=is_req)


def launch(
    kernel: Any,
    slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32, nodes per row, summed
    target_logits: torch.Tensor,  # [num_logits, vocab_size] float32, -inf: impossible
    draft_logits: torch.Tensor,  # [max_num_sources, vocab_size] float, by no temperature
    sources: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, row of draft_logits
    # that a node's drawn children came from, -1: it has none
    drawn: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, 1: drawn, 0: fixed
    temperatures: torch.Tensor,  # [max_num_reqs] float32, > 0, divide draft_logits
    token_ids: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, column 0 unused
    parents: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, root -1
    num_nodes: torch.Tensor,  # [max_num_reqs] int32, root included
    seeds: torch.Tensor,  # [max_num_reqs] int64
    positions: torch.Tensor,  # [num_reqs] int64, of the root
    sampled: torch.Tensor,  # out [>= num_reqs, max_num_nodes] int64, 0 past num_sampled
    num_sampled: torch.Tensor,  # out [>= num_reqs] int32, accepted nodes and a bonus
    path_nodes: torch.Tensor,  # out [>= num_reqs, max_num_nodes] int32, node per depth
    path_lengths: torch.Tensor,  # out [>= num_reqs] int32, accepted nodes
    **constants: Any,
) -> None:
    """Run one of the rules' kernels, which take the same arguments.

    A number is used once: it belongs to a seed, the root's position, which no other
    step of a request has, and a node.
    """
    num_reqs, max_num_nodes = slots.shape[0], parents.shape[1]
    vocab_size = target_logits.shape[1]
    trees = {"sources": sources, "drawn": drawn, "token_ids": token_ids}
    for name, tensor in trees.items():
        if tensor.shape != parents.shape:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} and parents {tuple(parents.shape)} "
                "must be of one shape"
            )
    if draft_logits.shape[1] != vocab_size:
        raise ValueError(
            f"draft_logits have {draft_logits.shape[1]} tokens, target_logits have "
            f"{vocab_size}: one vocabulary is needed"
        )
    if cu_num_logits.shape[0] <= num_reqs:
        raise ValueError(f"{num_reqs} requests need {num_reqs + 1} prefix sums")
    for name, tensor in (("sampled", sampled), ("path_nodes", path_nodes)):
        if tensor.shape[0] < num_reqs or tensor.shape[1] != max_num_nodes:
            raise ValueError(
                f"{name} {tuple(tensor.shape)}, expected at least {num_reqs} rows of "
                f"{max_num_nodes} nodes"
            )
    if min(num_sampled.shape[0], path_lengths.shape[0], positions.shape[0]) < num_reqs:
        raise ValueError(
            f"num_sampled, path_lengths and positions must have {num_reqs} rows"
        )
    vectors = (slots, cu_num_logits, temperatures, num_nodes, seeds, positions)
    outputs = (sampled, num_sampled, path_nodes, path_lengths)
    contiguous = [*vectors, draft_logits, parents, *trees.values(), *outputs]
    if not all(t.is_contiguous() for t in contiguous) or target_logits.stride(1) != 1:
        raise ValueError("all tensors must be contiguous, target_logits in their rows")
    if num_reqs == 0:
        return
    block_nodes = triton.next_power_of_2(max_num_nodes)
    block_vocab = min(triton.next_power_of_2(vocab_size), TILE_SIZE)
    block_reqs = min(
        triton.next_power_of_2(num_reqs),
        max(TILE_SIZE // max(block_vocab, block_nodes), 1),
    )
    kernel[(triton.cdiv(num_reqs, block_reqs),)](
        slots,
        cu_num_logits,
        target_logits,
        target_logits.stride(0),
        draft_logits,
        sources,
        drawn,
        temperatures,
        token_ids,
        parents,
        num_nodes,
        seeds,
        positions,
        sampled,
        num_sampled,
        path_nodes,
        path_lengths,
        num_reqs,
        max_num_nodes,
        vocab_size,
        **constants,
        BLOCK_REQS=block_reqs,
        BLOCK_NODES=block_nodes,
        BLOCK_VOCAB=block_vocab,
    )
