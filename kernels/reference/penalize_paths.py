import torch


def penalize_paths(
    logits: torch.Tensor,
    slots: torch.Tensor,
    nodes: torch.Tensor,
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    prompt_masks: torch.Tensor,
    output_counts: torch.Tensor,
) -> None:
    num_logits, vocab_size = logits.shape
    tokens = torch.arange(vocab_size, device=logits.device)
    node_of_row = nodes.tolist()
    for row, slot in enumerate(slots[:num_logits].tolist()):
        if repetition[slot] == 1 and frequency[slot] == 0 and presence[slot] == 0:
            continue
        counts = output_counts[slot, :vocab_size].clone()
        node = node_of_row[row]
        while node > 0:
            counts[token_ids[slot, node]] += 1
            node = int(parents[slot, node])
        is_prompt = (prompt_masks[slot, tokens // 32] >> (tokens % 32)) & 1 != 0
        scale = torch.where(is_prompt | (counts > 0), repetition[slot], 1.0)
        logits[row] *= torch.where(logits[row] > 0, 1.0 / scale, scale)
        logits[row] -= frequency[slot] * counts
        logits[row] -= presence[slot] * (counts > 0)
