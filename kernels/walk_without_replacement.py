"""Recursive rejection sampling over children drawn without replacement."""

import functools

import triton
import triton.language as tl

from vllm_treespec.kernels.residuals import (
    MAX_BETA,
    at,
    launch,
    load_rows,
    masses,
    next_node,
    pick,
    probability_of,
    softmax_terms,
    store_paths,
    uniform,
)


@triton.jit(do_not_specialize=["num_reqs"])
def _walk_down_kernel(
    slots_ptr,
    cu_num_logits_ptr,
    target_logits_ptr,
    target_logits_stride,
    draft_logits_ptr,
    sources_ptr,
    drawn_ptr,
    temperatures_ptr,
    token_ids_ptr,
    parents_ptr,
    num_nodes_ptr,
    seeds_ptr,
    positions_ptr,
    sampled_ptr,
    num_sampled_ptr,
    path_nodes_ptr,
    path_lengths_ptr,
    num_reqs,
    max_num_nodes,
    vocab_size,
    REPLACED: tl.constexpr,  # every draw is put back: q stays as it is
    BLOCK_REQS: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
):
    rows, slots, first_logits_row, num_row_nodes, usable = load_rows(
        slots_ptr, cu_num_logits_ptr, num_nodes_ptr, num_reqs, BLOCK_REQS
    )
    is_req = rows < num_reqs
    temperatures = tl.load(temperatures_ptr + slots, mask=is_req, other=1.0)
    ones = temperatures * 0 + 1
    seeds = tl.load(seeds_ptr + slots, mask=is_req, other=0)
    positions = tl.load(positions_ptr + rows, mask=is_req, other=0)

    nodes = tl.arange(0, BLOCK_NODES)
    cells = slots[:, None] * max_num_nodes + nodes[None, :]
    is_node = nodes[None, :] < usable[:, None]
    parents = tl.load(parents_ptr + cells, mask=is_node, other=-1)
    token_ids = tl.load(token_ids_ptr + cells, mask=is_node, other=-1)
    is_drawn = tl.load(drawn_ptr + cells, mask=is_node, other=0) > 0

    sampled = tl.full([BLOCK_REQS, BLOCK_NODES], 0, tl.int64)
    path = tl.full([BLOCK_REQS, BLOCK_NODES], 0, tl.int32)
    num_sampled = tl.full([BLOCK_REQS], 0, tl.int32)
    node = tl.where(num_row_nodes > 0, 0, -1)
    while tl.max(node, axis=0) >= 0:
        is_active = node >= 0
        target_offsets = (first_logits_row + node) * target_logits_stride
        source = tl.load(
            sources_ptr + slots * max_num_nodes + node, mask=is_active, other=-1
        ).to(tl.int64)
        draft_offsets = source * vocab_size
        is_child = is_active[:, None] & (parents == node[:, None])
        is_draw = is_child & is_drawn & (source >= 0)[:, None]
        has_draws = tl.max(is_draw.to(tl.int32), axis=1) > 0
        target_peak, target_scale = softmax_terms(
            target_logits_ptr, target_offsets, ones, is_active, vocab_size, BLOCK_VOCAB
        )
        draft_peak, draft_scale = softmax_terms(
            draft_logits_ptr,
            draft_offsets,
            temperatures,
            has_draws,
            vocab_size,
            BLOCK_VOCAB,
        )
        beta = temperatures.to(tl.float64) * 0
        target_mass, draft_mass = beta + 1, beta + 1
        is_removed = is_draw & (nodes[None, :] < 0)
        accepted = tl.full([BLOCK_REQS], -1, tl.int32)
        child = next_node(is_draw, nodes, node, BLOCK_NODES)
        while tl.max(child, axis=0) >= 0:
            is_trying = child >= 0
            token = at(token_ids, nodes, child)
            p = probability_of(
                target_logits_ptr,
                target_offsets,
                ones,
                target_peak,
                target_scale,
                token,
                is_trying,
            )
            q = probability_of(
                draft_logits_ptr,
                draft_offsets,
                temperatures,
                draft_peak,
                draft_scale,
                token,
                is_trying,
            )
            is_gone = is_removed & (token_ids == token[:, None])
            is_possible = (q > 0) & (tl.max(is_gone.to(tl.int32), axis=1) == 0)
            p = tl.maximum(p - beta.to(tl.float32) * q, 0.0).to(tl.float64)
            number = uniform(seeds, positions, 2 * tl.maximum(child, 0))
            is_hit = number * q.to(tl.float64) * target_mass < p * draft_mass
            accepted = tl.where(is_trying & is_possible & is_hit, child, accepted)
            is_rejected = is_trying & is_possible & (accepted < 0)

            step = target_mass / tl.where(draft_mass > 0, draft_mass, 1.0)
            beta = tl.where(is_rejected, tl.minimum(beta + step, MAX_BETA), beta)
            if not REPLACED:
                is_removed = is_removed | (
                    is_rejected[:, None] & (nodes[None, :] == child[:, None])
                )
            new_target_mass, new_draft_mass = masses(
                target_logits_ptr,
                target_offsets,
                target_peak,
                target_scale,
                draft_logits_ptr,
                draft_offsets,
                draft_peak,
                draft_scale,
                temperatures,
                beta,
                token_ids,
                is_removed,
                nodes,
                is_rejected,
                vocab_size,
                BLOCK_NODES,
                BLOCK_VOCAB,
            )
            target_mass = tl.where(is_rejected, new_target_mass, target_mass)
            if not REPLACED:
                draft_mass = tl.where(is_rejected, new_draft_mass, draft_mass)
            next_child = next_node(is_draw, nodes, child, BLOCK_NODES)
            child = tl.where(is_trying & (accepted < 0), next_child, -1)

        is_picking = is_active & (accepted < 0)
        token = pick(
            target_logits_ptr,
            target_offsets,
            target_peak,
            target_scale,
            draft_logits_ptr,
            draft_offsets,
            draft_peak,
            draft_scale,
            temperatures,
            beta,
            target_mass,
            uniform(seeds, positions, 2 * tl.maximum(node, 0) + 1),
            has_draws,
            is_picking,
            vocab_size,
            BLOCK_VOCAB,
        )
        is_match = is_child & (token_ids == token[:, None])
        is_match = is_match & (is_drawn == 0) & is_picking[:, None]
        fixed = next_node(is_match, nodes, node, BLOCK_NODES)
        token = tl.where(accepted >= 0, at(token_ids, nodes, accepted), token)
        is_column = is_active[:, None] & (nodes[None, :] == num_sampled[:, None])
        path = tl.where(is_column, node[:, None], path)
        sampled = tl.where(is_column, token[:, None].to(tl.int64), sampled)
        num_sampled += is_active.to(tl.int32)
        node = tl.where(accepted >= 0, accepted, fixed)

    store_paths(
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
    )


walk_without_replacement = functools.partial(launch, _walk_down_kernel, REPLACED=False)
"""Accept drawn children in draw order, each against what the last one left.

Siblings were drawn from ``softmax(draft_logits / temperature)`` without putting back, in
node order. What is left of the target after the last of them gives the next token, and
the walk goes on if a fixed child carries it. A drawn child of probability zero, of a
node without a source, or with an earlier sibling's token is no child: nothing can have
drawn it.
"""
