import math

import torch


def merge_candidates(
    slots: torch.Tensor,
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    num_candidates: torch.Tensor,
    merged_token_ids: torch.Tensor,
    merged_parents: torch.Tensor,
    merged_proposers: torch.Tensor,
    own_scores: torch.Tensor,
    num_merged: torch.Tensor,
    sibling_bits: torch.Tensor,
) -> None:
    for req, slot in enumerate(slots.tolist()):
        node_of_edge: dict[tuple[int, int], int] = {}  # (parent node, token) -> node
        own: list[dict[int, float]] = []  # per proposer: node -> its best score
        counts = num_candidates[:, req].tolist()
        for proposer, num in enumerate(counts):
            node_of: list[int] = []  # candidate -> node
            own.append({})
            candidates = zip(
                token_ids[proposer, req, :num].tolist(),
                parents[proposer, req, :num].tolist(),
                scores[proposer, req, :num].tolist(),
                strict=True,
            )
            for token_id, parent, score in candidates:
                edge = (node_of[parent] if parent >= 0 else -1, token_id)
                node = node_of_edge.setdefault(edge, len(node_of_edge))
                node_of.append(node)
                score = -math.inf if math.isnan(score) else score
                own[-1][node] = max(score, own[-1].get(node, -math.inf))

        size = len(node_of_edge)
        num_merged[slot] = size
        own_scores[:, slot] = -math.inf
        child_bits: dict[int, int] = {}  # parent node -> bit per proposer
        if size:
            edges = torch.tensor(list(node_of_edge))
            merged_parents[slot, :size] = edges[:, 0]
            merged_token_ids[slot, :size] = edges[:, 1]
            merged_proposers[slot, :size] = 0
        for proposer, best in enumerate(own):
            for node, score in best.items():
                own_scores[proposer, slot, node] = score
                merged_proposers[slot, node] |= 1 << proposer
                parent = int(merged_parents[slot, node])
                child_bits[parent] = child_bits.get(parent, 0) | 1 << proposer
        for node in range(size):
            sibling_bits[slot, node] = child_bits[int(merged_parents[slot, node])]
