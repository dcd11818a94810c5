import torch

from vllm_treespec.kernels.recycling import BIN_WIDTH, NONE, NUM_BINS
from vllm_treespec.kernels.reference.successors import log_weights, look_up


def learn_rates(
    before: torch.Tensor,
    token_ids: torch.Tensor,
    emitted: torch.Tensor,
    num_emitted: torch.Tensor,
    vocab_size: int,
    owners: torch.Tensor,
    table_ids: torch.Tensor,
    table_weights: torch.Tensor,
    max_depth: int,
    right: torch.Tensor,
    known: torch.Tensor,
) -> None:
    num_reqs, depth = before.shape[0], min(max_depth, emitted.shape[1])
    said = emitted[:num_reqs, :depth]
    is_said = torch.arange(depth, device=said.device) < num_emitted[:num_reqs, None]
    said = torch.where(is_said, said, NONE)
    parents = torch.cat([token_ids[:, None], said[:, :-1]], 1)
    grandparents = torch.cat([before[:, None], parents[:, :-1]], 1)
    rows, is_pair = look_up(grandparents, parents, vocab_size, owners)
    successors = table_ids[rows]  # [num_reqs, depth, k]
    is_right = (successors == said[:, :, None]) & is_said[:, :, None]
    # A node is in the tree if all on the way to it were right.
    found = is_right.any(2).long().cumprod(1)
    is_reached = torch.cat([torch.ones_like(found[:, :1]), found[:, :-1]], 1) > 0
    is_known = (is_reached & is_said)[:, :, None] & (successors != NONE)
    bins = (log_weights(table_weights[rows]) / -BIN_WIDTH).clamp(0, NUM_BINS - 1).long()
    bins = (bins + NUM_BINS * is_pair[:, :, None]).flatten()
    for counts, counted in ((right, is_right & is_known), (known, is_known)):
        counts.view(-1).index_add_(0, bins, counted.float().flatten())
