"""What a step's verification came to."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.bins import NUM_RANKS


@triton.jit
def store_counts(
    counts_ptr,
    verified,
    length,
    ranks,  # [BLOCK_RANKS]
    by_rank,  # [BLOCK_RANKS] int64
    nodes,  # [BLOCK_NODES], also depths
    bits,  # [BLOCK_NODES] by node, 0 where none was verified
    path_bits,  # [BLOCK_NODES] by depth, 0 for the root and behind the path
    num_proposers,
    NUM_RANKS: tl.constexpr,
):
    """Write one row of counts, see ``count_step``."""
    tl.store(counts_ptr, verified.to(tl.int64))
    tl.store(counts_ptr + 1 + ranks, by_rank, mask=ranks < NUM_RANKS)
    is_accepted = (nodes > 0) & (nodes <= length)
    drafted_ptr = counts_ptr + 1 + NUM_RANKS
    accepted_ptr = drafted_ptr + num_proposers
    emitted_ptr = accepted_ptr + num_proposers
    tl.store(emitted_ptr, (length + 1).to(tl.int64))
    for proposer in range(num_proposers):
        own = 1 << proposer
        drafted = tl.sum(((bits & own) != 0).to(tl.int64), axis=0)
        accepted = tl.sum(((path_bits & own) != 0).to(tl.int64), axis=0)
        # without the others' nodes the path ends, and what follows is lost with them
        is_alone = is_accepted & ((path_bits & ~own) == 0)
        first_alone = tl.min(tl.where(is_alone, nodes, length + 1), axis=0)
        tl.store(drafted_ptr + proposer, drafted)
        tl.store(accepted_ptr + proposer, accepted)
        exclusive = (length + 1 - first_alone).to(tl.int64)
        tl.store(emitted_ptr + 1 + proposer, exclusive)


@triton.jit
def _count_step_kernel(
    slots_ptr,
    cu_num_logits_ptr,
    num_nodes_ptr,
    parents_ptr,
    proposers_ptr,
    tree_stride,
    paths_ptr,
    paths_stride,
    path_lens_ptr,
    counts_ptr,
    counts_stride,
    num_proposers,
    NUM_RANKS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    num_rows = tl.load(cu_num_logits_ptr + row + 1) - tl.load(cu_num_logits_ptr + row)
    # of a tree, as much is verified as was scheduled; the rest of that is padding
    num_rows = tl.minimum(num_rows, tl.load(num_nodes_ptr + slot))
    verified = tl.maximum(num_rows - 1, 0)
    length = tl.load(path_lens_ptr + row)
    parents_ptr += slot * tree_stride
    proposers_ptr += slot * tree_stride
    paths_ptr += row * paths_stride
    counts_ptr += row * counts_stride

    nodes = tl.arange(0, BLOCK_NODES)
    is_node = (nodes > 0) & (nodes <= verified)
    parents = tl.load(parents_ptr + nodes, mask=is_node, other=-1)
    bits = tl.load(proposers_ptr + nodes, mask=is_node, other=0)
    ranks = tl.arange(0, BLOCK_RANKS)
    by_rank = tl.full([BLOCK_RANKS], 0, tl.int64)
    for depth in range(1, length + 1):
        node = tl.load(paths_ptr + depth)
        is_better = (parents == tl.load(parents_ptr + node)) & (nodes < node)
        rank = tl.minimum(tl.sum(is_better.to(tl.int32), axis=0), NUM_RANKS - 1)
        by_rank += (ranks == rank).to(tl.int64)
    is_accepted = (nodes > 0) & (nodes <= length)  # by depth
    path = tl.load(paths_ptr + nodes, mask=is_accepted, other=0)
    path_bits = tl.load(proposers_ptr + path, mask=is_accepted, other=0)
    store_counts(
        counts_ptr,
        verified,
        length,
        ranks,
        by_rank,
        nodes,
        bits,
        path_bits,
        num_proposers,
        NUM_RANKS,
    )


def num_proposers_of(
    counts: torch.Tensor, num_reqs: int, parents: torch.Tensor, proposers: torch.Tensor
) -> int:
    """How many proposers' columns ``counts`` has.

    Raises:
        ValueError: if a shape does not fit.
    """
    num_proposers, rest = divmod(counts.shape[1] - 2 - NUM_RANKS, 3)
    if rest or num_proposers < 1 or counts.shape[0] != num_reqs:
        raise ValueError(
            f"counts {tuple(counts.shape)}, expected {num_reqs} rows of "
            f"{2 + NUM_RANKS} columns and 3 for each proposer"
        )
    if (proposers.shape, proposers.stride()) != (parents.shape, parents.stride()):
        raise ValueError("parents and proposers must have one shape and one stride")
    return num_proposers


def count_step(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32, rows verified, root included
    num_nodes: torch.Tensor,  # [max_num_reqs] int32, root included
    parents: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, root -1
    proposers: torch.Tensor,  # [max_num_reqs, max_num_nodes] int32, bit per proposer
    paths: torch.Tensor,  # [>= num_reqs, max_num_nodes] int32, node per depth
    path_lens: torch.Tensor,  # [>= num_reqs] int32, accepted nodes
    counts: torch.Tensor,  # out [num_reqs, 2 + NUM_RANKS + 3 * num_proposers] int64
) -> None:
    """Count each request's verified tree. Its columns, root excluded everywhere:

    nodes verified; accepted nodes by rank, how many better siblings they have; per
    proposer the verified nodes that it proposed; of them, the accepted ones; tokens
    emitted, one more than nodes accepted; per proposer the accepted nodes that would have
    been lost without it: those from the first on that nobody else proposed.
    """
    num_reqs, max_num_nodes = slots.shape[0], parents.shape[1]
    num_proposers = num_proposers_of(counts, num_reqs, parents, proposers)
    if cu_num_logits.shape[0] <= num_reqs:
        raise ValueError(f"{num_reqs} requests need {num_reqs + 1} prefix sums")
    if min(paths.shape[0], path_lens.shape[0]) < num_reqs:
        raise ValueError(f"paths and path_lens are shorter than {num_reqs} rows")
    vectors = (slots, cu_num_logits, num_nodes, path_lens)
    if any(
        t.shape[-1] > 1 and t.stride(-1) != 1
        for t in (*vectors, parents, proposers, paths, counts)
    ):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _count_step_kernel[(num_reqs,)](
        slots,
        cu_num_logits,
        num_nodes,
        parents,
        proposers,
        parents.stride(0),
        paths,
        paths.stride(0),
        path_lens,
        counts,
        counts.stride(0),
        num_proposers,
        NUM_RANKS=NUM_RANKS,
        BLOCK_RANKS=triton.next_power_of_2(NUM_RANKS),
        BLOCK_NODES=triton.next_power_of_2(max_num_nodes),
    )
