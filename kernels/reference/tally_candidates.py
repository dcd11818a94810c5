import torch

from vllm_treespec.kernels.reference.calibration import bins_of, company_rows

RIGHT, UNKNOWN = 1, -1


def tally_candidates(
    slots: torch.Tensor,
    merged_token_ids: torch.Tensor,
    merged_parents: torch.Tensor,
    proposers: torch.Tensor,
    own_scores: torch.Tensor,
    num_merged: torch.Tensor,
    offering: torch.Tensor,
    token_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    num_emitted: torch.Tensor,
    right: torch.Tensor,
    known: torch.Tensor,
) -> None:
    for row, slot in enumerate(slots.tolist()):
        num, end = int(num_merged[slot]), int(num_tokens[slot])
        said = token_ids[slot, end - int(num_emitted[row]) : end].tolist()
        labels = torch.tensor(
            _label_tree(
                merged_token_ids[slot, :num].tolist(),
                merged_parents[slot, :num].tolist(),
                said,
            ),
            device=right.device,
        )
        bits = proposers[slot, None, :num]
        for proposer, scores in enumerate(own_scores[:, slot, :num]):
            rows = company_rows(bits, proposer, offering[slot, None])[0]
            bins = bins_of(scores)
            for counts, counted in ((right, labels == RIGHT), (known, labels >= 0)):
                is_counted = (counted & scores.isfinite()).float()
                counts.index_put_((rows, bins), is_counted, accumulate=True)


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
