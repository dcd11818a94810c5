"""Tree shapes that tests and benchmarks share."""

import torch


def random_parents(num_reqs: int, num_nodes: int, seed: int = 0) -> torch.Tensor:
    """[num_reqs, num_nodes] int32; every parent precedes its child, root -1."""
    gen = torch.Generator().manual_seed(seed)
    parents = torch.full((num_reqs, num_nodes), -1, dtype=torch.int32)
    for node in range(1, num_nodes):
        parents[:, node] = torch.randint(
            node, (num_reqs,), generator=gen, dtype=torch.int32
        )
    return parents


def chain_parents(num_reqs: int, num_nodes: int) -> torch.Tensor:
    """[num_reqs, num_nodes] int32; the degenerate tree, and the deepest one."""
    return torch.arange(-1, num_nodes - 1, dtype=torch.int32).repeat(num_reqs, 1)
