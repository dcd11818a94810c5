"""After which two tokens every verified node's logits stand, and what was picked there."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.successors import NONE


@triton.jit(do_not_specialize=["num_logits", "num_reqs"])
def _read_nodes_kernel(
    slots_ptr,
    cu_num_logits_ptr,
    logits_indices_ptr,
    input_ids_ptr,
    positions_ptr,
    texts_ptr,
    texts_stride,
    parents_ptr,
    parents_stride,
    num_nodes_ptr,
    paths_ptr,
    paths_stride,
    path_lens_ptr,
    sampled_ptr,
    sampled_stride,
    contexts_ptr,
    num_logits,
    roots_ptr,
    num_reqs,
    BLOCK_NODES: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + req).to(tl.int64)
    first_row = tl.load(cu_num_logits_ptr + req).to(tl.int64)
    num_rows = tl.load(cu_num_logits_ptr + req + 1) - first_row
    nodes = tl.arange(0, BLOCK_NODES)
    is_row = nodes < num_rows
    rows = first_row + nodes

    indices = tl.load(logits_indices_ptr + rows, mask=is_row, other=0)
    token_ids = tl.load(input_ids_ptr + indices, mask=is_row, other=0).to(tl.int64)
    # those of padding are stale, and may point behind the logits
    parents = tl.load(parents_ptr + slot * parents_stride + nodes, mask=is_row, other=0)
    parents = tl.minimum(tl.maximum(parents, 0), nodes)
    above = tl.load(logits_indices_ptr + first_row + parents, mask=is_row, other=0)
    before = tl.load(input_ids_ptr + above, mask=is_row, other=0).to(tl.int64)
    root_index = tl.load(logits_indices_ptr + first_row)
    root_position = tl.load(positions_ptr + root_index)
    root_id = tl.load(input_ids_ptr + root_index).to(tl.int64)
    before_root = tl.load(
        texts_ptr + slot * texts_stride + root_position - 1,
        mask=root_position > 0,
        other=NONE,
    ).to(tl.int64)
    before = tl.where(nodes == 0, before_root, before)
    token_ids = tl.where(nodes < tl.load(num_nodes_ptr + slot), token_ids, NONE)

    picks = tl.full([BLOCK_NODES], NONE, tl.int64)
    for step in range(0, tl.load(path_lens_ptr + req) + 1):
        node = tl.load(paths_ptr + req * paths_stride + step)
        pick = tl.load(sampled_ptr + req * sampled_stride + step)
        picks = tl.where(nodes == node, pick, picks)

    tl.store(contexts_ptr + rows, before, mask=is_row)
    tl.store(contexts_ptr + num_logits + rows, token_ids, mask=is_row)
    tl.store(contexts_ptr + 2 * num_logits + rows, picks, mask=is_row)
    tl.store(roots_ptr + req, before_root)
    tl.store(roots_ptr + num_reqs + req, root_id)


def read_nodes(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32
    logits_indices: torch.Tensor,  # [num_logits] int, a node's place in the batch
    input_ids: torch.Tensor,  # [num_tokens] int32
    positions: torch.Tensor,  # [num_tokens] int64
    texts: torch.Tensor,  # [max_num_reqs, max_len] int32, whole texts
    parents: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, -1: the root
    num_nodes: torch.Tensor,  # [max_num_reqs] int32, root included
    paths: torch.Tensor,  # [num_reqs, max_num_nodes] int32, accepted nodes, root first
    path_lens: torch.Tensor,  # [num_reqs] int32, root excluded
    sampled: torch.Tensor,  # [num_reqs, max_num_nodes] int64, picks along the path
    contexts: torch.Tensor,  # out [3, num_logits] int64: the token before a node's, its
    # own (NONE: padding), and what was picked there (NONE: not on the path)
    roots: torch.Tensor,  # out [2, num_reqs] int64: the root's token, after which
) -> None:
    """Find the contexts of all logits. Where a text begins, nothing is before its root."""
    num_reqs, num_logits = roots.shape[1], contexts.shape[1]
    if min(slots.shape[0], cu_num_logits.shape[0] - 1, sampled.shape[0]) < num_reqs:
        raise ValueError(f"a batch of {num_reqs} requests needs as many rows")
    if not (contexts.is_contiguous() and roots.is_contiguous()):
        raise ValueError("contexts and roots must be contiguous")
    _read_nodes_kernel[(num_reqs,)](
        slots,
        cu_num_logits,
        logits_indices,
        input_ids,
        positions,
        texts,
        texts.stride(0),
        parents,
        parents.stride(0),
        num_nodes,
        paths,
        paths.stride(0),
        path_lens,
        sampled,
        sampled.stride(0),
        contexts,
        num_logits,
        roots,
        num_reqs,
        BLOCK_NODES=triton.next_power_of_2(max(parents.shape[1], 16)),
        num_warps=1,
    )
