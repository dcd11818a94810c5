"""Which nodes each tree node may attend to, and how deep it sits."""

import torch
import triton
import triton.language as tl

BLOCK_NODES = 64


@triton.jit
def _ancestor_mask_kernel(
    slots_ptr,
    parents_ptr,
    parents_stride,
    num_nodes_ptr,
    depths_ptr,
    depths_stride,
    masks_ptr,
    masks_slot_stride,
    masks_node_stride,
    num_words,
    BLOCK_NODES: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    slot = tl.load(slots_ptr + tl.program_id(0)).to(tl.int64)
    num_nodes = tl.load(num_nodes_ptr + slot)
    nodes = tl.program_id(1) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    words = tl.arange(0, BLOCK_WORDS)
    is_node = nodes < num_nodes

    # every node climbs to the root; -1 is past it, and in no word
    ancestors = tl.where(is_node, nodes, -1)
    depths = tl.full([BLOCK_NODES], -1, tl.int32)
    masks = tl.full([BLOCK_NODES, BLOCK_WORDS], 0, tl.int32)
    while tl.max(ancestors, axis=0) >= 0:
        depths += (ancestors >= 0).to(tl.int32)
        bits = tl.full([BLOCK_NODES], 1, tl.int32) << (ancestors & 31)
        in_word = (ancestors >> 5)[:, None] == words[None, :]
        masks |= tl.where(in_word, bits[:, None], 0)
        ancestors = tl.load(
            parents_ptr + slot * parents_stride + ancestors,
            mask=ancestors >= 0,
            other=-1,
        )

    tl.store(depths_ptr + slot * depths_stride + nodes, depths, mask=is_node)
    node_offsets = nodes.to(tl.int64) * masks_node_stride
    tl.store(
        masks_ptr + slot * masks_slot_stride + node_offsets[:, None] + words[None, :],
        masks,
        mask=is_node[:, None] & (words < num_words)[None, :],
    )


def ancestor_mask(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    parents: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, root -1
    num_nodes: torch.Tensor,  # [max_num_reqs] int32, root included
    depths: torch.Tensor,  # out [max_num_reqs, max_num_nodes] int32, root 0
    masks: torch.Tensor,  # out [max_num_reqs, max_num_nodes, words] int32, bit j: node j
) -> None:
    """Mark, for every node of the slots' trees, itself and its ancestors.

    Parents precede their children. Columns past ``num_nodes`` keep what they held.
    """
    max_num_nodes = parents.shape[1]
    num_words = masks.shape[2]
    if depths.shape != parents.shape or masks.shape[:2] != parents.shape:
        raise ValueError(
            f"depths {tuple(depths.shape)} and masks {tuple(masks.shape)} must have a "
            f"place for every node of parents {tuple(parents.shape)}"
        )
    if num_words * 32 < max_num_nodes:
        raise ValueError(
            f"{num_words} mask words hold {num_words * 32} nodes, got {max_num_nodes}"
        )
    if any(
        t.shape[-1] > 1 and t.stride(-1) != 1
        for t in (slots, parents, num_nodes, depths, masks)
    ):
        raise ValueError("the last dimension of every tensor must be contiguous")
    grid = (slots.shape[0], triton.cdiv(max_num_nodes, BLOCK_NODES))
    _ancestor_mask_kernel[grid](
        slots,
        parents,
        parents.stride(0),
        num_nodes,
        depths,
        depths.stride(0),
        masks,
        masks.stride(0),
        masks.stride(1),
        num_words,
        BLOCK_NODES=BLOCK_NODES,
        BLOCK_WORDS=triton.next_power_of_2(num_words),
    )
