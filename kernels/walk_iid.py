"""Multi-step rejection sampling over children drawn independently."""

import torch

from vllm_treespec.kernels.residuals import launch
from vllm_treespec.kernels.walk_without_replacement import _walk_down_kernel


def walk_iid(
    slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32, nodes per row, summed
    target_logits: torch.Tensor,  # [num_logits, vocab_size] float32, -inf: impossible
    draft_logits: torch.Tensor,  # [max_num_sources, vocab_size] float, by no temperature
    sources: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, row of draft_logits
    # that a node's drawn children came from, -1: it has none
    drawn: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, 1: drawn, 0: fixed
    temperatures: torch.Tensor,  # [max_num_reqs] float32, > 0, divide draft_logits
    token_ids: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, column 0 unused
    parents: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, root -1
    num_nodes: torch.Tensor,  # [max_num_reqs] int32, root included
    seeds: torch.Tensor,  # [max_num_reqs] int64
    positions: torch.Tensor,  # [num_reqs] int64, of the root
    sampled: torch.Tensor,  # out [>= num_reqs, max_num_nodes] int64, 0 past num_sampled
    num_sampled: torch.Tensor,  # out [>= num_reqs] int32, accepted nodes and a bonus
    path_nodes: torch.Tensor,  # out [>= num_reqs, max_num_nodes] int32, node per depth
    path_lengths: torch.Tensor,  # out [>= num_reqs] int32, accepted nodes
) -> None:
    """As ``walk_without_replacement``, for siblings that were each drawn from all of
    ``softmax(draft_logits / temperature)`` and may carry the same token."""
    launch(
        _walk_down_kernel,
        slots,
        cu_num_logits,
        target_logits,
        draft_logits,
        sources,
        drawn,
        temperatures,
        token_ids,
        parents,
        num_nodes,
        seeds,
        positions,
        sampled,
        num_sampled,
        path_nodes,
        path_lengths,
        REPLACED=True,
    )
