import torch

from vllm_treespec.kernels.bins import NUM_RANKS


def count_step(
    slots: torch.Tensor,
    cu_num_logits: torch.Tensor,
    num_nodes: torch.Tensor,
    parents: torch.Tensor,
    proposers: torch.Tensor,
    paths: torch.Tensor,
    path_lens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    num_reqs, slots = slots.shape[0], slots.long()
    num_proposers = (counts.shape[1] - 2 - NUM_RANKS) // 3
    rows = torch.minimum(num_nodes[slots], cu_num_logits[: num_reqs + 1].diff())
    verified = (rows.long() - 1).clamp_(min=0)
    columns = torch.arange(parents.shape[1], device=slots.device)
    is_node = (columns > 0) & (columns <= verified[:, None])
    path = paths[:num_reqs].long()  # root first
    lengths = path_lens[:num_reqs].long()
    on_path = columns[1:] <= lengths[:, None]  # of path[:, 1:]
    bits = proposers[slots]
    own = 1 << torch.arange(num_proposers, device=slots.device, dtype=bits.dtype)
    is_own = (bits[:, :, None] & own) != 0
    path = torch.where(columns <= lengths[:, None], path, 0)
    path_bits = bits.gather(1, path)[:, 1:, None]
    path_is_own = (path_bits & own) != 0
    by_others = on_path[:, :, None] & (path_bits & ~own != 0)
    parts = [
        verified[:, None],
        _count_ranks(parents[slots], is_node, path, on_path),
        (is_own & is_node[:, :, None]).sum(1),
        (path_is_own & on_path[:, :, None]).sum(1),
        lengths[:, None] + 1,
        lengths[:, None] - by_others.cumprod(1).sum(1),
    ]
    counts.copy_(torch.cat(parts, 1))


def _count_ranks(
    parents: torch.Tensor,  # [num_reqs, max_num_nodes] int32, stale where no node
    is_node: torch.Tensor,  # [num_reqs, max_num_nodes] bool
    path: torch.Tensor,  # [num_reqs, max_num_nodes] int64, root first
    on_path: torch.Tensor,  # [num_reqs, max_num_nodes - 1] bool, of path[:, 1:]
) -> torch.Tensor:  # [num_reqs, NUM_RANKS] int64
    """Accepted nodes by how many better siblings they have."""
    num_reqs, num_columns = parents.shape
    of = torch.where(is_node, parents, 0).long()
    # Node -> its child on the path; one column more takes what is behind the path.
    taken = path.new_zeros(num_reqs, num_columns + 1)
    taken.scatter_(1, torch.where(on_path, path[:, :-1], num_columns), path[:, 1:])
    columns = torch.arange(num_columns, device=path.device)
    is_better = is_node & (columns < taken.gather(1, of))
    num_better = torch.zeros_like(path).scatter_add_(1, of, is_better.long())
    ranks = num_better.gather(1, path[:, :-1]).clamp_(max=NUM_RANKS - 1)
    counted = torch.arange(NUM_RANKS, device=path.device)
    return ((ranks[:, :, None] == counted) & on_path[:, :, None]).sum(1)
