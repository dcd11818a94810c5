import torch

RIGHT, UNKNOWN = 1, -1


def label_candidates(
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    num_candidates: torch.Tensor,
    emitted: torch.Tensor,
    num_emitted: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    labels.fill_(UNKNOWN)
    for row in range(token_ids.shape[1]):
        said = emitted[row, : num_emitted[row]].tolist()
        for proposer, num in enumerate(num_candidates[:, row].tolist()):
            labels[proposer, row, :num] = torch.tensor(
                _label_tree(
                    token_ids[proposer, row, :num].tolist(),
                    parents[proposer, row, :num].tolist(),
                    said,
                )
            )


def _label_tree(token_ids: list[int], parents: list[int], said: list[int]) -> list[int]:
    depths: list[int] = []
    labels: list[int] = []
    for token_id, parent in zip(token_ids, parents, strict=True):
        depth = depths[parent] + 1 if parent >= 0 else 1
        label = labels[parent] if parent >= 0 else RIGHT
        # a wrong turn stays one, and so does the end of what is known
        if label == RIGHT:
            label = int(token_id == said[depth - 1]) if depth <= len(said) else UNKNOWN
        depths.append(depth)
        labels.append(label)
    return labels
