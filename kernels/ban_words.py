"""Words that must not be completed, at every node of a tree."""

import torch
import triton
import triton.language as tl


@triton.jit
def _ban_words_kernel(
    logits_ptr,
    logits_stride,
    slots_ptr,
    nodes_ptr,
    token_ids_ptr,
    token_ids_stride,
    parents_ptr,
    parents_stride,
    word_token_ids_ptr,
    word_token_ids_stride,
    word_starts_ptr,
    word_starts_stride,
    num_words_ptr,
    all_token_ids_ptr,
    all_token_ids_stride,
    prompt_lens_ptr,
    total_lens_ptr,
):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if word >= tl.load(num_words_ptr + slot):
        return

    starts = word_starts_ptr + slot * word_starts_stride
    first = tl.load(starts + word).to(tl.int32)
    last = tl.load(starts + word + 1).to(tl.int32) - 1
    word_token_ids = word_token_ids_ptr + slot * word_token_ids_stride

    # backwards: up the path to the root, which is committed, then through the output
    node = tl.load(nodes_ptr + row).to(tl.int32)
    position = tl.load(total_lens_ptr + slot).to(tl.int32) - 1
    prompt_len = tl.load(prompt_lens_ptr + slot).to(tl.int32)
    place = last - 1
    while place >= first:
        in_tree = node > 0
        in_output = (node <= 0) & (position >= prompt_len)
        drafted = tl.load(
            token_ids_ptr + slot * token_ids_stride + node, mask=in_tree, other=-1
        )
        emitted = tl.load(
            all_token_ids_ptr + slot * all_token_ids_stride + position,
            mask=in_output,
            other=-1,
        )
        actual = tl.where(in_tree, drafted, emitted)
        is_match = actual == tl.load(word_token_ids + place)
        # one past a match of the whole beginning, two past a mismatch
        place = tl.where(is_match, place - 1, first - 2)
        position -= tl.where(in_tree, 0, 1)
        node = tl.load(
            parents_ptr + slot * parents_stride + node, mask=in_tree, other=0
        )

    banned = tl.load(word_token_ids + last)
    tl.store(
        logits_ptr + row * logits_stride + banned,
        float("-inf"),
        mask=place == first - 1,
    )


def ban_words(
    logits: torch.Tensor,  # in/out [num_logits, vocab_size] fp32, one row per node
    slots: torch.Tensor,  # [num_logits] int, logits row -> request slot
    nodes: torch.Tensor,  # [num_logits] int, logits row -> node
    token_ids: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, column 0 unused
    parents: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, root -1
    word_token_ids: torch.Tensor,  # [max_num_reqs, max_word_tokens] int32, all words'
    word_starts: torch.Tensor,  # [max_num_reqs, max_num_words + 1] int32, and the end
    num_words: torch.Tensor,  # [max_num_reqs] int32
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] int32, prompt, output
    prompt_lens: torch.Tensor,  # [max_num_reqs] int32
    total_lens: torch.Tensor,  # [max_num_reqs] int32, committed tokens, root included
    max_num_words: int,  # of any of these slots
) -> None:
    """Rule out a word's last token wherever the tokens before it are the path's last.

    What comes before the root is the output so far; the prompt does not count.
    """
    num_logits = logits.shape[0]
    if token_ids.shape != parents.shape:
        raise ValueError(
            f"token_ids {tuple(token_ids.shape)} and parents {tuple(parents.shape)} "
            "must be of one shape"
        )
    if min(slots.shape[0], nodes.shape[0]) < num_logits:
        raise ValueError(f"slots and nodes are shorter than {num_logits} logits rows")
    if word_starts.shape[1] <= max_num_words:
        raise ValueError(
            f"word_starts {tuple(word_starts.shape)} cannot hold {max_num_words} words"
        )
    vectors = (slots, nodes, num_words, prompt_lens, total_lens)
    matrices = (logits, token_ids, parents, word_token_ids, word_starts, all_token_ids)
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in (*vectors, *matrices)):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _ban_words_kernel[(num_logits, max_num_words)](
        logits,
        logits.stride(0),
        slots,
        nodes,
        token_ids,
        token_ids.stride(0),
        parents,
        parents.stride(0),
        word_token_ids,
        word_token_ids.stride(0),
        word_starts,
        word_starts.stride(0),
        num_words,
        all_token_ids,
        all_token_ids.stride(0),
        prompt_lens,
        total_lens,
    )
