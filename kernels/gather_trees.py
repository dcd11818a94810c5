"""What this step's batch rows attend to, and at which positions."""

import torch
import triton
import triton.language as tl

BLOCK_NODES = 64


# a new batch size must not compile a new kernel
@triton.jit(do_not_specialize=["num_reqs"])
def _gather_positions_kernel(
    slots_ptr,
    cu_num_logits_ptr,
    query_start_loc_ptr,
    num_nodes_ptr,
    depths_ptr,
    depths_stride,
    positions_ptr,
    row_num_nodes_ptr,
    row_depths_ptr,
    row_depths_stride,
    root_positions_ptr,
    num_reqs,
    BLOCK_NODES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row >= num_reqs:
        # rows that pad a CUDA graph would attend to the previous step's trees
        tl.store(row_num_nodes_ptr + row, 0)
        return

    num_row_nodes = tl.load(cu_num_logits_ptr + row + 1) - tl.load(
        cu_num_logits_ptr + row
    )
    tl.store(row_num_nodes_ptr + row, num_row_nodes)
    query_end = tl.load(query_start_loc_ptr + row + 1).to(tl.int64)
    # without a root, the last query row stands in; an empty batch has none either
    root_query_row = tl.maximum(query_end - tl.maximum(num_row_nodes, 1), 0)
    root_position = tl.load(positions_ptr + root_query_row)
    tl.store(root_positions_ptr + row, root_position.to(tl.int32))

    slot = tl.load(slots_ptr + row).to(tl.int64)
    nodes = tl.arange(0, BLOCK_NODES)
    is_row_node = nodes < num_row_nodes
    is_built = is_row_node & (nodes > 0) & (nodes < tl.load(num_nodes_ptr + slot))
    depths = tl.load(
        depths_ptr + slot * depths_stride + nodes,
        mask=is_built,
        other=tl.minimum(nodes, 1),
    )
    tl.store(row_depths_ptr + row * row_depths_stride + nodes, depths, mask=is_row_node)
    tl.store(
        positions_ptr + root_query_row + nodes,
        root_position + depths,
        mask=is_row_node & (nodes > 0),
    )


@triton.jit
def _gather_masks_kernel(
    slots_ptr,
    cu_num_logits_ptr,
    num_nodes_ptr,
    masks_ptr,
    masks_slot_stride,
    masks_node_stride,
    row_masks_ptr,
    row_masks_row_stride,
    row_masks_node_stride,
    num_words,
    BLOCK_NODES: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first_node = tl.program_id(1) * BLOCK_NODES
    num_row_nodes = tl.load(cu_num_logits_ptr + row + 1) - tl.load(
        cu_num_logits_ptr + row
    )
    if first_node >= num_row_nodes:
        return

    slot = tl.load(slots_ptr + row).to(tl.int64)
    nodes = first_node + tl.arange(0, BLOCK_NODES)
    words = tl.arange(0, BLOCK_WORDS)
    is_row_node = nodes < num_row_nodes
    is_built = is_row_node & (nodes > 0) & (nodes < tl.load(num_nodes_ptr + slot))
    is_word = (words < num_words)[None, :]

    self_bits = tl.full([BLOCK_NODES], 1, tl.int32) << (nodes & 31)
    in_word = (nodes >> 5)[:, None] == words[None, :]
    root_bit = tl.where(words == 0, 1, 0)[None, :]
    root_and_self = tl.where(in_word, self_bits[:, None], 0) | root_bit
    masks_offsets = nodes.to(tl.int64)[:, None] * masks_node_stride + words[None, :]
    masks = tl.load(
        masks_ptr + slot * masks_slot_stride + masks_offsets,
        mask=is_built[:, None] & is_word,
        other=root_and_self,
    )
    row_offsets = nodes.to(tl.int64)[:, None] * row_masks_node_stride + words[None, :]
    tl.store(
        row_masks_ptr + row * row_masks_row_stride + row_offsets,
        masks,
        mask=is_row_node[:, None] & is_word,
    )


def gather_trees(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32, nodes per row, summed
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    num_nodes: torch.Tensor,  # [max_num_reqs] int32, root included
    depths: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32
    masks: torch.Tensor,  # [max_num_reqs, max_num_nodes, words] int32
    positions: torch.Tensor,  # in/out [num_tokens] int64
    row_num_nodes: torch.Tensor,  # out [max_num_rows] int32, 0 past num_reqs
    row_depths: torch.Tensor,  # out [max_num_rows, max_num_nodes] int32
    row_masks: torch.Tensor,  # out [max_num_rows, max_num_nodes, words] int32
    root_positions: torch.Tensor,  # out [max_num_rows] int32
) -> None:
    """Bring the slots' trees into batch order and place their nodes by depth.

    A row's nodes are its last ``cu_num_logits`` query rows, the root first. Nodes that
    were scheduled but never built (placeholders) become children of the root that see
    the root and themselves. A row without logits gets 0 nodes and, for its root, the
    position of its last query row. Columns past a row's nodes keep what they held.
    """
    num_reqs, max_num_nodes = slots.shape[0], depths.shape[1]
    max_num_rows, num_words = row_num_nodes.shape[0], masks.shape[2]
    if max_num_rows < num_reqs or root_positions.shape[0] < num_reqs:
        raise ValueError(f"room for {max_num_rows} rows, got {num_reqs} requests")
    if cu_num_logits.shape[0] <= num_reqs or query_start_loc.shape[0] <= num_reqs:
        raise ValueError(f"{num_reqs} requests need {num_reqs + 1} prefix sums")
    if row_depths.shape != (max_num_rows, max_num_nodes):
        raise ValueError(
            f"row_depths {tuple(row_depths.shape)}, expected {max_num_rows} rows of the "
            f"{max_num_nodes} nodes of depths"
        )
    if masks.shape[:2] != depths.shape or num_words * 32 < max_num_nodes:
        raise ValueError(
            f"masks {tuple(masks.shape)} cannot hold {max_num_nodes} nodes"
        )
    if row_masks.shape != (*row_depths.shape, num_words):
        raise ValueError(
            f"row_masks {tuple(row_masks.shape)}, expected a mask of {num_words} words "
            f"for each of row_depths {tuple(row_depths.shape)}"
        )
    vectors = (slots, cu_num_logits, query_start_loc, num_nodes, positions)
    outputs = (row_num_nodes, row_depths, row_masks, root_positions)
    if any(
        t.shape[-1] > 1 and t.stride(-1) != 1
        for t in (*vectors, depths, masks, *outputs)
    ):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _gather_positions_kernel[(max_num_rows,)](
        slots,
        cu_num_logits,
        query_start_loc,
        num_nodes,
        depths,
        depths.stride(0),
        positions,
        row_num_nodes,
        row_depths,
        row_depths.stride(0),
        root_positions,
        num_reqs,
        BLOCK_NODES=triton.next_power_of_2(max_num_nodes),
    )
    _gather_masks_kernel[(num_reqs, triton.cdiv(max_num_nodes, BLOCK_NODES))](
        slots,
        cu_num_logits,
        num_nodes,
        masks,
        masks.stride(0),
        masks.stride(1),
        row_masks,
        row_masks.stride(0),
        row_masks.stride(1),
        num_words,
        BLOCK_NODES=BLOCK_NODES,
        BLOCK_WORDS=triton.next_power_of_2(num_words),
    )
