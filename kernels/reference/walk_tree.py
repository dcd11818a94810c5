import torch

from vllm_treespec.kernels.reference.count_step import count_step


def walk_tree(
    slots: torch.Tensor,
    cu_num_logits: torch.Tensor,
    target_ids: torch.Tensor,
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    sampled: torch.Tensor,
    num_sampled: torch.Tensor,
    paths: torch.Tensor,
    path_lens: torch.Tensor,
    proposers: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    cu_logits = cu_num_logits.tolist()
    targets = target_ids.tolist()
    for row, slot in enumerate(slots.tolist()):
        row_targets = targets[cu_logits[row] : cu_logits[row + 1]]
        usable = min(len(row_targets), int(num_nodes[slot]))
        children: dict[tuple[int, int], int] = {}  # (parent, token) -> first such node
        edges = zip(
            parents[slot, :usable].tolist(),
            token_ids[slot, :usable].tolist(),
            strict=True,
        )
        for node, edge in enumerate(edges):
            children.setdefault(edge, node)

        path: list[int] = []
        node_or_none = 0 if row_targets else None
        while node_or_none is not None:
            path.append(node_or_none)
            node_or_none = children.get((node_or_none, row_targets[node_or_none]))

        sampled[row] = 0
        paths[row] = 0
        if path:
            sampled[row, : len(path)] = torch.tensor(
                [row_targets[node] for node in path]
            )
            paths[row, : len(path)] = torch.tensor(path)
        num_sampled[row] = len(path)
        path_lens[row] = max(len(path) - 1, 0)

    if counts is not None and proposers is not None:
        count_step(
            slots,
            cu_num_logits,
            num_nodes,
            parents,
            proposers,
            paths,
            path_lens,
            counts,
        )
