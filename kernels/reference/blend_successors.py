import torch

from vllm_treespec.kernels.recycling import NONE, RATE
from vllm_treespec.kernels.reference.successors import owners_of_pairs


def blend_successors(
    keys: torch.Tensor,
    entries: torch.Tensor,
    before: torch.Tensor,
    token_ids: torch.Tensor,
    successors: torch.Tensor,
    weights: torch.Tensor,
    vocab_size: int,
    owners: torch.Tensor,
    table_ids: torch.Tensor,
    table_weights: torch.Tensor,
    max_age: int,
) -> None:
    rows, nobody, num_contexts = keys >> 32, owners.shape[0] - 1, before.shape[0]
    places = torch.arange(rows.shape[0], device=keys.device)
    ages = torch.searchsorted(rows, rows, right=True) - 1 - places
    pairs = owners_of_pairs(before, token_ids, vocab_size)
    own = torch.cat([token_ids, pairs])[entries]
    contexts = entries % max(num_contexts, 1)
    for age in reversed(range(max_age)):
        # No two of the same age are of one row, but for nobody's.
        turn = torch.where(ages == age, rows, nobody)
        _blend(
            turn,
            own,
            successors[contexts],
            weights[contexts],
            owners,
            table_ids,
            table_weights,
        )


def _blend(
    rows: torch.Tensor,
    own: torch.Tensor,
    successors: torch.Tensor,
    weights: torch.Tensor,
    owners: torch.Tensor,
    table_ids: torch.Tensor,
    table_weights: torch.Tensor,
) -> None:
    is_own = (owners[rows] == own)[:, None]
    old_ids, old = table_ids[rows], table_weights[rows] * (1 - RATE) * is_own
    is_same = successors[:, :, None] == old_ids[:, None, :]
    new = RATE * weights + (is_same * old[:, None, :]).sum(2)
    old = old.masked_fill(is_same.any(1), 0.0)
    ids = torch.cat([successors, old_ids], 1)
    best = torch.cat([new, old], 1).sort(dim=1, descending=True, stable=True)
    kept = slice(old.shape[1])
    weights, ids = best.values[:, kept], ids.gather(1, best.indices[:, kept])
    is_somebody = rows < owners.shape[0] - 1
    is_kept = (weights > 0) & is_somebody[:, None]
    owners[rows] = torch.where(is_somebody, own, NONE)
    table_ids[rows] = torch.where(is_kept, ids, NONE)
    table_weights[rows] = torch.where(is_kept, weights, 0.0)
