"""Which path through its tree the target took."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.bins import NUM_RANKS
from vllm_treespec.kernels.count_step import num_proposers_of, store_counts


@triton.jit
def _walk_tree_kernel(
    slots_ptr,
    cu_num_logits_ptr,
    target_ids_ptr,
    token_ids_ptr,
    token_ids_stride,
    parents_ptr,
    parents_stride,
    num_nodes_ptr,
    sampled_ptr,
    sampled_stride,
    num_sampled_ptr,
    paths_ptr,
    paths_stride,
    path_lens_ptr,
    proposers_ptr,
    counts_ptr,
    counts_stride,
    max_num_nodes,
    num_proposers,
    NUM_RANKS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    first_logits_row = tl.load(cu_num_logits_ptr + row).to(tl.int64)
    num_row_nodes = tl.load(cu_num_logits_ptr + row + 1) - first_logits_row

    nodes = tl.arange(0, BLOCK_NODES)
    # a node counts if it was built and scheduled; the others have no reachable parent
    num_verified = tl.minimum(num_row_nodes, tl.load(num_nodes_ptr + slot))
    is_node = nodes < num_verified
    parents = tl.load(
        parents_ptr + slot * parents_stride + nodes, mask=is_node, other=-1
    )
    token_ids = tl.load(
        token_ids_ptr + slot * token_ids_stride + nodes, mask=is_node, other=0
    ).to(tl.int64)

    sampled = tl.full([BLOCK_NODES], 0, tl.int64)
    path = tl.full([BLOCK_NODES], 0, tl.int32)
    num_sampled = tl.full((), 0, tl.int32)
    ranks = tl.arange(0, BLOCK_RANKS)
    by_rank = tl.full([BLOCK_RANKS], 0, tl.int64)
    node = tl.where(num_row_nodes > 0, 0, -1)
    while node >= 0:
        target_id = tl.load(target_ids_ptr + first_logits_row + node)
        sampled = tl.where(nodes == num_sampled, target_id, sampled)
        path = tl.where(nodes == num_sampled, node, path)
        num_sampled += 1
        is_hit = (parents == node) & (token_ids == target_id)
        child = tl.min(tl.where(is_hit, nodes, BLOCK_NODES), axis=0)
        is_accepted = child < BLOCK_NODES
        # the root has a parent of -1, so it is nobody's better child
        num_better = tl.sum(((parents == node) & (nodes < child)).to(tl.int32), axis=0)
        rank = tl.minimum(num_better, NUM_RANKS - 1)
        by_rank += ((ranks == rank) & is_accepted).to(tl.int64)
        node = tl.where(is_accepted, child, -1)

    is_column = nodes < max_num_nodes
    tl.store(sampled_ptr + row * sampled_stride + nodes, sampled, mask=is_column)
    tl.store(paths_ptr + row * paths_stride + nodes, path, mask=is_column)
    tl.store(num_sampled_ptr + row, num_sampled)
    length = tl.maximum(num_sampled - 1, 0)
    tl.store(path_lens_ptr + row, length)
    if counts_ptr is not None:
        proposers_ptr += slot * parents_stride
        is_draft = is_node & (nodes > 0)
        bits = tl.load(proposers_ptr + nodes, mask=is_draft, other=0)
        is_drafted = (nodes > 0) & (nodes <= length)  # by depth
        path_bits = tl.load(proposers_ptr + path, mask=is_drafted, other=0)
        store_counts(
            counts_ptr + row * counts_stride,
            tl.maximum(num_verified - 1, 0),
            length,
            ranks,
            by_rank,
            nodes,
            bits,
            path_bits,
            num_proposers,
            NUM_RANKS,
        )


def walk_tree(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32, nodes per row, summed
    target_ids: torch.Tensor,  # [num_logits] int64, the target's token at every node
    token_ids: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, column 0 unused
    parents: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, root -1
    num_nodes: torch.Tensor,  # [max_num_reqs] int32, root included
    sampled: torch.Tensor,  # out [>= num_reqs, max_num_nodes] int64, 0 past num_sampled
    num_sampled: torch.Tensor,  # out [>= num_reqs] int32, accepted nodes and a bonus
    paths: torch.Tensor,  # out [>= num_reqs, max_num_nodes] int32, node per depth
    path_lens: torch.Tensor,  # out [>= num_reqs] int32, accepted nodes
    proposers: torch.Tensor | None = None,  # as parents, bit per proposer
    counts: torch.Tensor | None = None,  # out, see ``count_step``
) -> None:
    """Follow the target's choices from the root for as long as the tree has them.

    What comes out is what plain decoding would have sampled, whatever the tree holds: a
    tree only decides how many tokens one step yields. Nodes that were not scheduled
    (truncated) or not built (placeholders) are never accepted; of siblings with the
    same token the first one is. A row without logits samples nothing.

    Counts are those of ``count_step``, for which ``proposers`` must be given.
    """
    num_reqs, max_num_nodes = slots.shape[0], parents.shape[1]
    if token_ids.shape != parents.shape:
        raise ValueError(
            f"token_ids {tuple(token_ids.shape)} and parents {tuple(parents.shape)} "
            "must be of one shape"
        )
    if cu_num_logits.shape[0] <= num_reqs:
        raise ValueError(f"{num_reqs} requests need {num_reqs + 1} prefix sums")
    for name, tensor in (("sampled", sampled), ("paths", paths)):
        if tensor.shape[0] < num_reqs or tensor.shape[1] != max_num_nodes:
            raise ValueError(
                f"{name} {tuple(tensor.shape)}, expected at least {num_reqs} rows of "
                f"{max_num_nodes} nodes"
            )
    if min(num_sampled.shape[0], path_lens.shape[0]) < num_reqs:
        raise ValueError(f"num_sampled and path_lens are shorter than {num_reqs} rows")
    vectors = (slots, cu_num_logits, target_ids, num_nodes, num_sampled, path_lens)
    if any(
        t.shape[-1] > 1 and t.stride(-1) != 1
        for t in (*vectors, token_ids, parents, sampled, paths)
    ):
        raise ValueError("the last dimension of every tensor must be contiguous")
    num_proposers = 0
    if counts is not None and proposers is not None:
        num_proposers = num_proposers_of(counts, num_reqs, parents, proposers)
        if counts.stride(1) != 1:
            raise ValueError("the columns of counts must be contiguous")
    _walk_tree_kernel[(num_reqs,)](
        slots,
        cu_num_logits,
        target_ids,
        token_ids,
        token_ids.stride(0),
        parents,
        parents.stride(0),
        num_nodes,
        sampled,
        sampled.stride(0),
        num_sampled,
        paths,
        paths.stride(0),
        path_lens,
        proposers,
        counts,
        0 if counts is None else counts.stride(0),
        max_num_nodes,
        num_proposers,
        NUM_RANKS=NUM_RANKS,
        BLOCK_RANKS=triton.next_power_of_2(NUM_RANKS),
        BLOCK_NODES=triton.next_power_of_2(max_num_nodes),
    )
