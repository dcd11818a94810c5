"""Traversal verification: whole paths are accepted, leaves first."""

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
    put,
    softmax_terms,
    store_paths,
    uniform,
)


@triton.jit(do_not_specialize=["num_reqs"])
def _walk_traversal_kernel(
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

    # A node's residual is beta and two masses, its draws' distributions two terms each.
    zeros = tl.zeros([BLOCK_REQS, BLOCK_NODES], tl.float64)
    acceptances, betas = zeros + 1, zeros
    target_masses, draft_masses = zeros + 1, zeros + 1
    target_peaks, target_scales = zeros.to(tl.float32), zeros.to(tl.float32)
    draft_peaks, draft_scales = zeros.to(tl.float32), zeros.to(tl.float32)
    is_rejected = is_node & (nodes[None, :] < 0)

    sampled = tl.full([BLOCK_REQS, BLOCK_NODES], 0, tl.int64)
    path = tl.full([BLOCK_REQS, BLOCK_NODES], 0, tl.int32)
    depth = tl.full([BLOCK_REQS], 0, tl.int32)
    node = tl.where(num_row_nodes > 0, 0, -1)
    last_child = node  # children up to it have had their turn
    is_new = node >= 0
    while tl.max(node, axis=0) >= 0:
        # Every request takes one step: down to a child, or the last word on a node.
        is_active = node >= 0
        target_offsets = (first_logits_row + node) * target_logits_stride
        source = tl.load(
            sources_ptr + slots * max_num_nodes + node, mask=is_active, other=-1
        ).to(tl.int64)
        draft_offsets = source * vocab_size
        is_child = is_active[:, None] & (parents == node[:, None])
        is_draw = is_child & is_drawn & (source >= 0)[:, None]
        has_draws = tl.max(is_draw.to(tl.int32), axis=1) > 0
        is_new_parent = is_new & has_draws
        peak, scale = softmax_terms(
            target_logits_ptr,
            target_offsets,
            ones,
            is_new_parent,
            vocab_size,
            BLOCK_VOCAB,
        )
        target_peaks = put(target_peaks, nodes, node, peak, is_new_parent)
        target_scales = put(target_scales, nodes, node, scale, is_new_parent)
        peak, scale = softmax_terms(
            draft_logits_ptr,
            draft_offsets,
            temperatures,
            is_new_parent,
            vocab_size,
            BLOCK_VOCAB,
        )
        draft_peaks = put(draft_peaks, nodes, node, peak, is_new_parent)
        draft_scales = put(draft_scales, nodes, node, scale, is_new_parent)

        acceptance = at(acceptances, nodes, node)
        is_candidate = is_draw & (acceptance > 0)[:, None]
        child = next_node(is_candidate, nodes, last_child, BLOCK_NODES)
        has_child = child >= 0
        token = at(token_ids, nodes, child)
        p = probability_of(
            target_logits_ptr,
            target_offsets,
            ones,
            at(target_peaks, nodes, node),
            at(target_scales, nodes, node),
            token,
            has_child,
        )
        q = probability_of(
            draft_logits_ptr,
            draft_offsets,
            temperatures,
            at(draft_peaks, nodes, node),
            at(draft_scales, nodes, node),
            token,
            has_child,
        )
        is_gone = is_draw & is_rejected & (token_ids == token[:, None])
        is_possible = (q > 0) & (tl.max(is_gone.to(tl.int32), axis=1) == 0)
        is_descending = has_child & is_possible
        p = tl.maximum(p - at(betas, nodes, node).to(tl.float32) * q, 0.0)
        gain = acceptance * p.to(tl.float64) * at(draft_masses, nodes, node)
        cost = q.to(tl.float64) * at(target_masses, nodes, node)
        ratio = tl.minimum(gain / tl.where(cost > 0, cost, 1.0), 1.0)
        acceptances = put(acceptances, nodes, child, ratio, is_descending)

        is_leaf = is_active & (child < 0)
        number = uniform(seeds, positions, 2 * tl.maximum(node, 0))
        is_accepted = is_leaf & (number < acceptance)
        is_leaving = is_leaf & (number >= acceptance)

        # A rejected node leaves its parent what the target has beyond the draft.
        parent = tl.where(is_leaving, at(parents, nodes, node), -1)
        is_rejected = is_rejected | (
            is_leaving[:, None] & (nodes[None, :] == node[:, None])
        )
        old_mass = at(target_masses, nodes, parent)
        old_acceptance = at(acceptances, nodes, parent)
        step = old_acceptance * at(draft_masses, nodes, parent)
        step = old_mass / tl.where(step > 0, step, 1.0)
        beta = tl.minimum(at(betas, nodes, parent) + step, MAX_BETA)
        parent_source = tl.load(
            sources_ptr + slots * max_num_nodes + parent, mask=is_leaving, other=0
        ).to(tl.int64)
        target_mass, draft_mass = masses(
            target_logits_ptr,
            (first_logits_row + parent) * target_logits_stride,
            at(target_peaks, nodes, parent),
            at(target_scales, nodes, parent),
            draft_logits_ptr,
            parent_source * vocab_size,
            at(draft_peaks, nodes, parent),
            at(draft_scales, nodes, parent),
            temperatures,
            beta,
            token_ids,
            is_rejected & (parents == parent[:, None]) & is_drawn,
            nodes,
            is_leaving,
            vocab_size,
            BLOCK_NODES,
            BLOCK_VOCAB,
        )
        excess = old_acceptance * target_mass / tl.where(old_mass > 0, old_mass, 1.0)
        # At 1 there is nothing to lose, and 0 / 0 if p and q are the same.
        missing = tl.where(old_acceptance < 1, 1 - old_acceptance, 1.0)
        new_acceptance = tl.where(old_acceptance < 1, excess / (excess + missing), 1.0)
        betas = put(betas, nodes, parent, beta, is_leaving)
        target_masses = put(target_masses, nodes, parent, target_mass, is_leaving)
        draft_masses = put(draft_masses, nodes, parent, draft_mass, is_leaving)
        acceptances = put(acceptances, nodes, parent, new_acceptance, is_leaving)

        # An accepted node ends the path, unless a fixed child carries the next token.
        target_peak, target_scale = softmax_terms(
            target_logits_ptr,
            target_offsets,
            ones,
            is_accepted,
            vocab_size,
            BLOCK_VOCAB,
        )
        picked = pick(
            target_logits_ptr,
            target_offsets,
            target_peak,
            target_scale,
            draft_logits_ptr,
            draft_offsets,
            at(draft_peaks, nodes, node),
            at(draft_scales, nodes, node),
            temperatures,
            at(betas, nodes, node),
            at(target_masses, nodes, node),
            uniform(seeds, positions, 2 * tl.maximum(node, 0) + 1),
            has_draws,
            is_accepted,
            vocab_size,
            BLOCK_VOCAB,
        )
        is_match = is_child & (token_ids == picked[:, None])
        is_match = is_match & (is_drawn == 0) & is_accepted[:, None]
        fixed = next_node(is_match, nodes, node, BLOCK_NODES)

        path = put(path, nodes, depth, node, is_active)
        next_token = tl.where(is_accepted, picked, token).to(tl.int64)
        sampled = put(sampled, nodes, depth, next_token, is_accepted | is_descending)
        is_new = is_descending | (fixed >= 0)
        last_child = tl.where(is_leaving, node, tl.where(has_child, child, last_child))
        depth += is_new.to(tl.int32) - is_leaving.to(tl.int32)
        stays = has_child & (is_possible == 0)
        node = tl.where(is_leaving, parent, tl.where(stays, node, fixed))
        node = tl.where(is_descending, child, node)
        last_child = tl.where(is_new, node, last_child)

    num_sampled = tl.where(num_row_nodes > 0, depth + 1, 0)
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


walk_traversal = functools.partial(launch, _walk_traversal_kernel)
"""Accept the deepest path that the target can be said to have taken.

Going down to the first leaf, a path is accepted with the probability that its nodes'
ratios leave together; a rejected leaf is removed and leaves its parent a residual, until
the parent is a leaf itself. The root is always accepted. What is left of the target at
the end of the path gives the next token; a fixed child that carries it is the root of the
next such traversal.

Children were drawn as for ``walk_without_replacement``, and the numbers are keyed as
there: by the root's position, since nodes are tried that lie deeper than the accepted
path, and would be again, with the same numbers, in the next step.
"""
