import torch

from vllm_treespec.kernels.recycling import NONE, PICK_WEIGHT
from vllm_treespec.kernels.reference.successors import is_of, rows_of


def weigh_successors(
    before: torch.Tensor,
    token_ids: torch.Tensor,
    best_ids: torch.Tensor,
    best_values: torch.Tensor,
    picks: torch.Tensor,
    vocab_size: int,
    num_rows: int,
    keys: torch.Tensor,
    successors: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    num_contexts = picks.shape[0]
    is_accepted = picks != NONE
    picks = torch.where(is_accepted, picks, best_ids[:, 0])
    is_pick = best_ids == picks[:, None]
    # A pick that is none of the best takes the last one's place.
    is_pick[:, -1] |= ~is_pick.any(1)
    shares = best_values.float().softmax(1)
    is_sound = shares.isfinite().all(1) & is_of(picks, vocab_size)
    successors.copy_(torch.where(is_pick, picks[:, None], best_ids))
    weights.copy_(PICK_WEIGHT * is_pick + (1 - PICK_WEIGHT) * shares)
    rows = rows_of(before, torch.where(is_sound, token_ids, NONE), vocab_size, num_rows)
    order = torch.arange(num_contexts, device=keys.device)
    keys.copy_(((rows << 32) | (order + num_contexts * is_accepted)).flatten())
