import torch


def ancestor_mask(
    slots: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    depths: torch.Tensor,
    masks: torch.Tensor,
) -> None:
    num_words = masks.shape[2]
    for slot in slots.tolist():
        slot_depths: list[int] = []
        slot_masks: list[int] = []
        for node, parent in enumerate(parents[slot, : int(num_nodes[slot])].tolist()):
            slot_depths.append(slot_depths[parent] + 1 if parent >= 0 else 0)
            slot_masks.append((slot_masks[parent] if parent >= 0 else 0) | 1 << node)
        if slot_masks:
            depths[slot, : len(slot_depths)] = torch.tensor(slot_depths)
            # a Python integer's little-endian bytes are its mask words in order
            words = b"".join(
                mask.to_bytes(4 * num_words, "little") for mask in slot_masks
            )
            masks[slot, : len(slot_masks)] = (
                torch.frombuffer(bytearray(words), dtype=torch.int32)
                .view(-1, num_words)
                .to(masks.device)
            )
