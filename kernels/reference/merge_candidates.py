import torch


def merge_candidates(
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    num_candidates: torch.Tensor,
    merged_token_ids: torch.Tensor,
    merged_parents: torch.Tensor,
    merged_scores: torch.Tensor,
    merged_proposers: torch.Tensor,
    num_merged: torch.Tensor,
) -> None:
    for req in range(token_ids.shape[1]):
        node_of_edge: dict[tuple[int, int], int] = {}  # (parent node, token) -> node
        best: list[float] = []
        proposers: list[int] = []
        for proposer, num in enumerate(num_candidates[:, req].tolist()):
            node_of: list[int] = []  # candidate -> node
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
                if node == len(best):
                    best.append(float("-inf"))
                    proposers.append(0)
                if score > best[node]:  # NaN counts as -inf
                    best[node] = score
                proposers[node] |= 1 << proposer

        num_merged[req] = len(best)
        if best:
            edges = torch.tensor(list(node_of_edge))
            merged_parents[req, : len(best)] = edges[:, 0]
            merged_token_ids[req, : len(best)] = edges[:, 1]
            merged_scores[req, : len(best)] = torch.tensor(best)
            merged_proposers[req, : len(best)] = torch.tensor(proposers)
