import torch

from vllm_treespec.kernels.reference.voices import Voices, listen, mix

RIGHT, UNKNOWN = 1, -1


def tally_candidates(
    slots: torch.Tensor,
    merged_token_ids: torch.Tensor,
    merged_parents: torch.Tensor,
    proposers: torch.Tensor,
    own_scores: torch.Tensor,
    num_merged: torch.Tensor,
    sibling_bits: torch.Tensor,
    slopes: torch.Tensor,
    offsets: torch.Tensor,
    token_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    num_emitted: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    for row, slot in enumerate(slots.tolist()):
        num, end = int(num_merged[slot]), int(num_tokens[slot])
        said = token_ids[slot, end - int(num_emitted[row]) : end].tolist()
        parents = merged_parents[slot, :num]
        labels = _label_children(
            merged_token_ids[slot, :num].tolist(), parents.tolist(), said
        )
        voices = listen(
            parents[None],
            proposers[slot, None, :num],
            own_scores[:, slot, None, :num],
            sibling_bits[slot, None, :num],
        )
        sums[row] = sum_voices(
            voices, slopes, offsets, torch.tensor([labels], device=sums.device)
        )


def sum_voices(
    said: Voices,
    slopes: torch.Tensor,  # [num_voices] float32
    offsets: torch.Tensor,  # [num_voices] float32
    labels: torch.Tensor,  # [num_rows, num_nodes] int, 1 right, 0 wrong, -1 unknown
) -> torch.Tensor:  # [num_voices, NUM_SUMS] float32
    """Per voice: children, the loss's gradient and its curvature.

    Those who speak of a child share its error. As each has ``1 / number`` of a say,
    steps that they take at the same time do not add up to too long a one.
    """
    number = said.speaks.sum(0)
    is_known = (labels >= 0) & (number > 0)
    share = torch.where(is_known, 1 / number, 0.0)
    rates = mix(said, slopes, offsets).sigmoid()
    error = torch.where(is_known, rates - labels, 0.0) * share
    bend = torch.where(is_known, rates * (1 - rates), 0.0) * share
    odds = said.odds
    parts = (is_known, odds * error, error, odds * odds * bend, odds * bend, bend)
    columns = [
        torch.where(said.speaks, part, 0.0).expand(odds.shape).flatten()
        for part in parts
    ]
    found = slopes.new_zeros(len(slopes), len(columns))
    return found.index_add_(0, said.voices.flatten(), torch.stack(columns, 1))


def _label_children(
    token_ids: list[int], parents: list[int], said: list[int]
) -> list[int]:
    """Of nodes whose parents are right; of others nothing is known."""
    depths: list[int] = []
    labels: list[int] = []
    for token_id, parent in zip(token_ids, parents, strict=True):
        depth = depths[parent] + 1 if parent >= 0 else 1
        is_known = (parent < 0 or labels[parent] == RIGHT) and depth <= len(said)
        depths.append(depth)
        labels.append(int(token_id == said[depth - 1]) if is_known else UNKNOWN)
    return labels
