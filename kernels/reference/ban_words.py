from itertools import pairwise

import torch


def ban_words(
    logits: torch.Tensor,
    slots: torch.Tensor,
    nodes: torch.Tensor,
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    word_token_ids: torch.Tensor,
    word_starts: torch.Tensor,
    num_words: torch.Tensor,
    all_token_ids: torch.Tensor,
    prompt_lens: torch.Tensor,
    total_lens: torch.Tensor,
    max_num_words: int,
) -> None:
    node_of_row = nodes.tolist()
    for row, slot in enumerate(slots[: logits.shape[0]].tolist()):
        count = int(num_words[slot])
        if count == 0:
            continue
        path: list[int] = []
        node = node_of_row[row]
        while node > 0:
            path.insert(0, int(token_ids[slot, node]))
            node = int(parents[slot, node])
        output = all_token_ids[slot, prompt_lens[slot] : total_lens[slot]].tolist()
        tokens = output + path

        starts = word_starts[slot, : count + 1].tolist()
        for start, end in pairwise(starts):
            *before, banned = word_token_ids[slot, start:end].tolist()
            if before == tokens[len(tokens) - len(before) :]:
                logits[row, banned] = float("-inf")
