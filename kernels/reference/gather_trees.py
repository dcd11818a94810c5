import torch


def gather_trees(
    slots: torch.Tensor,
    cu_num_logits: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_nodes: torch.Tensor,
    depths: torch.Tensor,
    masks: torch.Tensor,
    positions: torch.Tensor,
    row_num_nodes: torch.Tensor,
    row_depths: torch.Tensor,
    row_masks: torch.Tensor,
    root_positions: torch.Tensor,
) -> None:
    star_depths, star_masks = _star(row_masks)
    row_num_nodes[slots.shape[0] :] = 0
    cu_logits = cu_num_logits.tolist()
    query_ends = query_start_loc[1:].tolist()
    for row, slot in enumerate(slots.tolist()):
        num = cu_logits[row + 1] - cu_logits[row]
        root = max(query_ends[row] - max(num, 1), 0)
        row_num_nodes[row] = num
        root_positions[row] = positions[root]

        built = min(num, int(num_nodes[slot]))
        row_depths[row, :num] = star_depths[:num]
        row_depths[row, 1:built] = depths[slot, 1:built]
        row_masks[row, :num] = star_masks[:num]
        row_masks[row, 1:built] = masks[slot, 1:built]
        if num:
            positions[root + 1 : root + num] = positions[root] + row_depths[row, 1:num]


def _star(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Depths and masks of a root whose children have no children."""
    _, max_num_nodes, num_words = like.shape
    depths = torch.ones(max_num_nodes, dtype=torch.int32, device=like.device)
    depths[0] = 0
    words = b"".join(
        (1 | 1 << node).to_bytes(4 * num_words, "little")
        for node in range(max_num_nodes)
    )
    masks = torch.frombuffer(bytearray(words), dtype=torch.int32)
    return depths, masks.view(-1, num_words).to(like.device)
