import math

import torch


def select_nodes(
    slots: torch.Tensor,
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    proposers: torch.Tensor,
    num_candidates: torch.Tensor,
    max_nodes: torch.Tensor,
    chain_only: torch.Tensor,
    num_sampled: torch.Tensor,
    num_nodes: int,
    tree_token_ids: torch.Tensor,
    tree_parents: torch.Tensor,
    tree_proposers: torch.Tensor,
    tree_num_nodes: torch.Tensor,
    draft_tokens: torch.Tensor,
) -> None:
    most = min(num_nodes, draft_tokens.shape[1])
    for req, slot in enumerate(slots.tolist()):
        num = int(num_candidates[slot])
        parent_of = parents[slot, :num].tolist()
        costs = _path_costs(parent_of, scores[slot, :num].tolist())
        order = sorted(range(num), key=lambda node: (costs[node], node))
        order = [candidate for candidate in order if costs[candidate] < math.inf]
        if chain_only[slot]:
            order = _best_path(order, parent_of)
        budget = min(int(max_nodes[slot]), most) if num_sampled[req] > 0 else 0
        order = order[: max(budget, 0)]

        node_of = {candidate: node for node, candidate in enumerate(order, start=1)}
        size = len(order) + 1
        tree_num_nodes[slot] = size
        tree_parents[slot, :size] = torch.tensor(
            [-1, *(node_of.get(parent_of[candidate], 0) for candidate in order)]
        )
        tree_token_ids[slot, 0] = 0
        tree_token_ids[slot, 1:size] = token_ids[slot, order]
        tree_proposers[slot, 0] = 0
        tree_proposers[slot, 1:size] = proposers[slot, order]
        draft_tokens[req] = 0
        draft_tokens[req, : len(order)] = token_ids[slot, order]


def _path_costs(parents: list[int], scores: list[float]) -> list[float]:
    """The cost of the worst node between the root and each candidate, inclusive."""
    costs: list[float] = []
    for parent, score in zip(parents, scores, strict=True):
        own_cost = math.inf if math.isnan(score) else -score
        costs.append(max(own_cost, costs[parent] if parent >= 0 else 0.0))
    return costs


def _best_path(order: list[int], parents: list[int]) -> list[int]:
    path: list[int] = []
    for candidate in order:  # best first, hence a parent before its children
        if parents[candidate] == (path[-1] if path else -1):
            path.append(candidate)
    return path
