"""Repetition, frequency and presence penalties at every node of a tree."""

import torch
import triton
import triton.language as tl

BLOCK_SIZE = 8192


@triton.jit
def _penalize_paths_kernel(
    logits_ptr,
    logits_stride,
    slots_ptr,
    nodes_ptr,
    token_ids_ptr,
    token_ids_stride,
    parents_ptr,
    parents_stride,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    prompt_masks_ptr,
    prompt_masks_stride,
    output_counts_ptr,
    output_counts_stride,
    vocab_size,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    repetition = tl.load(repetition_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    if (repetition == 1.0) & (frequency == 0.0) & (presence == 0.0):
        return

    block = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    is_token = block < vocab_size
    counts = tl.load(
        output_counts_ptr + slot * output_counts_stride + block, mask=is_token, other=0
    )
    # the root is committed and counted, so the climb ends there
    node = tl.load(nodes_ptr + row).to(tl.int32)
    while node > 0:
        token_id = tl.load(token_ids_ptr + slot * token_ids_stride + node)
        counts += (block == token_id).to(tl.int32)
        node = tl.load(parents_ptr + slot * parents_stride + node)

    words = tl.load(
        prompt_masks_ptr + slot * prompt_masks_stride + (block >> 5),
        mask=is_token,
        other=0,
    )
    is_prompt = ((words >> (block & 31)) & 1) != 0
    is_output = counts > 0
    # vLLM's arithmetic, operation by operation: one ulp can change a sample
    offsets = row * logits_stride + block
    logits = tl.load(logits_ptr + offsets, mask=is_token, other=0.0)
    scale = tl.where(is_prompt | is_output, repetition, 1.0)
    logits *= tl.where(logits > 0, 1.0 / scale, scale)
    logits -= frequency * counts
    logits -= presence * is_output
    tl.store(logits_ptr + offsets, logits, mask=is_token)


def penalize_paths(
    logits: torch.Tensor,  # in/out [num_logits, vocab_size] fp32, one row per node
    slots: torch.Tensor,  # [num_logits] int, logits row -> request slot
    nodes: torch.Tensor,  # [num_logits] int, logits row -> node
    token_ids: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, column 0 unused
    parents: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, root -1
    repetition: torch.Tensor,  # [max_num_reqs] fp32, 1: none
    frequency: torch.Tensor,  # [max_num_reqs] fp32, 0: none
    presence: torch.Tensor,  # [max_num_reqs] fp32, 0: none
    prompt_masks: torch.Tensor,  # [max_num_reqs, words] int32, bit per prompt token
    output_counts: torch.Tensor,  # [max_num_reqs, vocab_size] int32, root included
) -> None:
    """Penalize at every node what the output would hold if its path were accepted.

    Siblings and cousins do not count. Slots without penalties keep their logits.
    """
    num_logits, vocab_size = logits.shape
    if token_ids.shape != parents.shape:
        raise ValueError(
            f"token_ids {tuple(token_ids.shape)} and parents {tuple(parents.shape)} "
            "must be of one shape"
        )
    if min(slots.shape[0], nodes.shape[0]) < num_logits:
        raise ValueError(f"slots and nodes are shorter than {num_logits} logits rows")
    if output_counts.shape[1] < vocab_size or prompt_masks.shape[1] * 32 < vocab_size:
        raise ValueError(
            f"output_counts {tuple(output_counts.shape)} and prompt_masks "
            f"{tuple(prompt_masks.shape)} must cover {vocab_size} tokens"
        )
    vectors = (slots, nodes, repetition, frequency, presence)
    matrices = (logits, token_ids, parents, prompt_masks, output_counts)
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in (*vectors, *matrices)):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _penalize_paths_kernel[(num_logits, triton.cdiv(vocab_size, BLOCK_SIZE))](
        logits,
        logits.stride(0),
        slots,
        nodes,
        token_ids,
        token_ids.stride(0),
        parents,
        parents.stride(0),
        repetition,
        frequency,
        presence,
        prompt_masks,
        prompt_masks.stride(0),
        output_counts,
        output_counts.stride(0),
        vocab_size,
        BLOCK_SIZE=BLOCK_SIZE,
    )
