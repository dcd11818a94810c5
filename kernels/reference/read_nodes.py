import torch

from vllm_treespec.kernels.recycling import NONE


def read_nodes(
    slots: torch.Tensor,
    cu_num_logits: torch.Tensor,
    logits_indices: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    texts: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    paths: torch.Tensor,
    path_lens: torch.Tensor,
    sampled: torch.Tensor,
    contexts: torch.Tensor,
    roots: torch.Tensor,
) -> None:
    num_reqs, num_logits = roots.shape[1], contexts.shape[1]
    slots, first_rows = slots[:num_reqs].long(), cu_num_logits[: num_reqs + 1].long()
    rows = torch.repeat_interleave(first_rows.diff(), output_size=num_logits)
    nodes = torch.arange(num_logits, device=slots.device) - first_rows[rows]
    token_ids = input_ids[logits_indices].long()
    root_positions = positions[logits_indices[first_rows[:-1]]]
    before_root = texts[slots, (root_positions - 1).clamp(min=0)].long()
    before_root = torch.where(root_positions > 0, before_root, NONE)
    # Those of padding are stale, and may point behind the logits.
    above = torch.minimum(parents[slots[rows], nodes].clamp(min=0), nodes)
    before = torch.where(
        nodes == 0, before_root[rows], token_ids[first_rows[rows] + above]
    )
    is_node = nodes < num_nodes[slots[rows]]
    # One place more takes what is behind the paths.
    picks = sampled.new_full((num_logits + 1,), NONE)
    width = min(paths.shape[1], sampled.shape[1])
    path = paths[:num_reqs, :width].long()
    steps = torch.arange(width, device=slots.device)
    is_step = steps <= path_lens[:num_reqs, None]
    path_rows = torch.where(is_step, first_rows[:-1, None] + path, num_logits)
    picks.scatter_(0, path_rows.flatten(), sampled[:num_reqs, :width].flatten())
    contexts[0], contexts[2] = before, picks[:-1]
    contexts[1] = torch.where(is_node, token_ids, NONE)
    roots[0], roots[1] = before_root, token_ids[first_rows[:-1]]
