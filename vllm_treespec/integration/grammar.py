"""Structured output on trees: every node gets the mask of its own path.

vLLM walks a grammar along a chain of drafts. Here it is walked along a tree, depth
first, forward into a node and back out of it. A node that the grammar forbids is never
reached: at its parent the target cannot pick its token.

While a model reasons, its grammar waits. Paths of one tree may end the reasoning at
different nodes, or not at all; the grammar begins behind each of these ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

Parents = list[int]  # per draft token, that of its parent, -1: the root


@dataclass
class DraftTrees(DraftTokenIds):
    """Drafts in node order, roots left out."""

    parents: dict[str, Parents] = field(default_factory=dict)  # request -> its tree


def wrap_update_draft_token_ids(original: Callable[..., None]) -> Callable[..., None]:
    """Remember the trees that drafts form; for either of the scheduler's updates."""

    @functools.wraps(original)
    def update(self: Any, draft_token_ids: Any, *args: Any) -> None:
        if isinstance(draft_token_ids, DraftTrees):
            manager = self.structured_output_manager
            known = vars(manager).get("treespec_parents", {}) | draft_token_ids.parents
            # A request that is left out of some steps keeps its drafts, and its tree.
            manager.treespec_parents = {
                name: parents
                for name, parents in known.items()
                if name in self.requests
            }
        original(self, draft_token_ids, *args)

    return update


def wrap_validate_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a tree whole: its longest valid prefix says nothing about its paths."""

    @functools.wraps(original)
    def validate_tokens(self: Any, request: Any, spec_tokens: list[int]) -> Any:
        parents = vars(self).get("treespec_parents", {}).get(request.request_id)
        if parents is None:
            return original(self, request, spec_tokens)
        return spec_tokens[: len(parents)]

    return validate_tokens


def wrap_grammar_bitmask(original: Callable[..., Any]) -> Callable[..., Any]:
    """Fill the rows of trees by their nodes."""

    @functools.wraps(original)
    def grammar_bitmask(
        self: Any,
        requests: Any,
        structured_output_request_ids: list[str],
        scheduled_spec_decode_tokens: dict[str, list[int]],
    ) -> Any:
        ids = structured_output_request_ids
        trees = vars(self).get("treespec_parents", {})
        if not trees.keys() & {*ids}:
            return original(self, requests, ids, scheduled_spec_decode_tokens)
        scheduled = {name: scheduled_spec_decode_tokens.get(name, []) for name in ids}
        # vLLM fills the roots' rows, and allows everything behind padding.
        padded = {
            req_id: [-1] * len(tokens) if req_id in trees else tokens
            for req_id, tokens in scheduled.items()
        }
        bitmask = original(self, requests, ids, padded)
        # vLLM 0.33 has as many rows for each request, 0.32 as many as it has tokens:
        # where all have as many as there can be, that is the same.
        most = self.vllm_config.num_speculative_tokens + 1
        is_even = len(bitmask) == most * len(scheduled)
        row = 0
        for req_id, tokens in scheduled.items():
            if req_id in trees:
                nodes = list(zip(tokens, trees[req_id], strict=False))
                rows = self._grammar_bitmask[row : row + len(nodes) + 1]
                fill(self, requests[req_id], nodes, rows)
            row += most if is_even else len(tokens) + 1
        return bitmask  # a view of what was filled

    return grammar_bitmask


def fill(
    manager: Any,  # vLLM's StructuredOutputManager
    request: Any,
    nodes: Sequence[tuple[int, int]],  # token, parent; parents before children
    rows: torch.Tensor,  # [1 + num_nodes, words] int32, the root's is filled
) -> None:
    """Fill the row of every node, for what may follow it."""
    grammar = request.structured_output_request.grammar
    bounds = functools.partial(manager._get_constraint_bounds, request)
    if bounds([]).constraint_start == 0:
        _mask(grammar, request.request_id, nodes, rows)
        return
    rows[1:] = rows[0]  # of a model that reasons
    for end, is_text in ends_of_reasoning(nodes, bounds).items():
        # The grammar's root is the end, or what is in front of it.
        places = {end: 0 if is_text else -1}
        part = [(nodes[end][0], -1)] if is_text else []
        for node, (token, parent) in enumerate(nodes):
            if parent in places:
                places[node] = len(part)
                part.append((token, places[parent]))
        mask = rows.new_full((1 + len(part), rows.shape[1]), -1)
        _mask(grammar, request.request_id, part, mask)
        for node, place in places.items():
            rows[1 + node] = mask[1 + place]


def ends_of_reasoning(
    nodes: Sequence[tuple[int, int]],  # token, parent; parents before children
    bounds: Callable[[Sequence[int]], Any],  # tokens -> vLLM's ConstraintBounds
) -> dict[int, bool]:
    """The first node of each path with which reasoning has ended, and whether that is
    the first token of the text, rather than a mark in front of it."""
    parents = {parent for token, parent in nodes if token >= 0}
    ends = {}
    for leaf in range(len(nodes)):
        if leaf in parents or nodes[leaf][0] < 0:
            continue
        path, node = [], leaf
        while node >= 0:
            path.append(node)
            node = nodes[node][1]
        path.reverse()
        found = bounds([nodes[node][0] for node in path])
        if found.constraint_start <= len(path):
            end = path[found.constraint_start - 1]
            ends[end] = found.grammar_start < found.constraint_start
    return ends


def _mask(
    grammar: Any,  # vLLM's StructuredOutputGrammar, at the root
    req_id: str,
    nodes: Sequence[tuple[int, int]],  # token, parent; parents before children
    rows: torch.Tensor,  # [1 + num_nodes, words] int32
) -> None:
    if isinstance(grammar, XgrammarGrammar):
        traverse(grammar, nodes, rows)
        return
    if not grammar.is_terminated():
        grammar.fill_bitmask(rows, 0)
    walk(grammar, req_id, nodes, rows[1:])


def traverse(
    grammar: XgrammarGrammar,
    nodes: Sequence[tuple[int, int]],  # token, parent; parents before children
    bitmask: torch.Tensor,  # [1 + num_nodes, words] int32, all tokens allowed
) -> None:
    """As ``walk``, by xgrammar's own traversal; of the root's row as well."""
    if grammar.is_terminated():
        return
    token_ids = [0] + [token for token, _ in nodes]
    first_child, next_sibling = [-1] * len(token_ids), [-1] * len(token_ids)
    for node, (token, parent) in reversed([*enumerate(nodes, 1)]):
        if token >= 0:  # a tree may be cut short, and is padded then
            next_sibling[node] = first_child[parent + 1]
            first_child[parent + 1] = node
    links = torch.tensor([first_child, next_sibling, token_ids])
    grammar.matcher.traverse_draft_tree(*links, bitmask)
    # It leaves nothing to nodes that cannot be reached, and to those behind the end.
    bitmask[(bitmask == 0).all(dim=1)] = -1


def walk(
    grammar: Any,  # vLLM's StructuredOutputGrammar, at the root
    req_id: str,
    nodes: Sequence[tuple[int, int]],  # token, parent; parents before children
    bitmask: Any,  # [>= nodes, words] int32, a row per node that allows every token
) -> None:
    """Fill the row of every node that the grammar allows, with what it allows behind it.

    What follows the end of a text is not for the grammar to say. It is back at the root
    afterwards.
    """
    children: list[list[int]] = [[] for _ in range(len(nodes) + 1)]
    for node, (token, parent) in enumerate(nodes):
        if token >= 0:  # a tree may be cut short, and is padded then
            children[parent + 1].append(node)
    stack = [iter(children[0])]
    while stack:
        node = next(stack[-1], -1)
        if node < 0:
            stack.pop()
            if stack:
                grammar.rollback(1)
            continue
        said = [nodes[node][0]]
        if grammar.is_terminated() or not grammar.validate_tokens(said):
            continue
        grammar.accept_tokens(req_id, said)
        if not grammar.is_terminated():
            grammar.fill_bitmask(bitmask, node)
        stack.append(iter(children[node + 1]))
