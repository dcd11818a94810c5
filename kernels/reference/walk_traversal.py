import torch

from vllm_treespec.kernels.reference.drawn_trees import traversal, walk_rows


def walk_traversal(
    slots: torch.Tensor,
    cu_num_logits: torch.Tensor,
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor,
    sources: torch.Tensor,
    drawn: torch.Tensor,
    temperatures: torch.Tensor,
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    sampled: torch.Tensor,
    num_sampled: torch.Tensor,
    path_nodes: torch.Tensor,
    path_lengths: torch.Tensor,
) -> None:
    walk_rows(
        traversal,
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
    )
