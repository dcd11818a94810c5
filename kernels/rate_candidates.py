"""What merged candidates are worth, by what their proposers say of each child."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.bins import NUM_COMPANIES
from vllm_treespec.kernels.voices import log_sigmoid, mixed_odds, of_parents

MIN_BLOCK = 32


@triton.jit
def _rate_candidates_kernel(
    slots_ptr,
    parents_ptr,
    proposers_ptr,
    own_scores_ptr,
    own_scores_proposer_stride,
    scores_ptr,
    merged_stride,
    num_merged_ptr,
    sibling_bits_ptr,
    slopes_ptr,
    offsets_ptr,
    is_drawn_ptr,
    num_proposers,
    BLOCK_NODES: tl.constexpr,
):
    req = tl.program_id(0)
    slot = tl.load(slots_ptr + req).to(tl.int64)
    nodes = tl.arange(0, BLOCK_NODES)
    is_node = nodes < tl.load(num_merged_ptr + slot)
    columns = slot * merged_stride + nodes
    parents = tl.load(parents_ptr + columns, mask=is_node, other=-1)
    bits = tl.load(proposers_ptr + columns, mask=is_node, other=0)
    sibling_bits = tl.load(sibling_bits_ptr + columns, mask=is_node, other=0)
    is_drawn = tl.full((), 0, tl.int1)
    if is_drawn_ptr is not None:
        is_drawn = tl.load(is_drawn_ptr + req).to(tl.int1)
        nothing = tl.full([BLOCK_NODES], float("-inf"), tl.float32)
        tl.store(own_scores_ptr + columns, nothing, mask=is_node & is_drawn)

    odds, number = mixed_odds(
        own_scores_ptr + columns,
        own_scores_proposer_stride,
        is_node,
        parents,
        bits,
        sibling_bits,
        slopes_ptr,
        offsets_ptr,
        is_drawn.to(tl.int32),
        num_proposers,
    )
    scores = tl.where(number > 0, log_sigmoid(odds), float("-inf"))
    # Every node adds up what lies below an ancestor, and takes that ancestor's ancestor
    # next: each round skips twice as many levels as the one before.
    ancestors = parents
    while tl.max(ancestors, axis=0) >= 0:
        scores += of_parents(scores, ancestors, 0.0)
        ancestors = of_parents(ancestors, ancestors, -1)
    scores = tl.where(is_drawn & ((bits & 1) != 0), 0.0, scores)
    tl.store(scores_ptr + columns, scores, mask=is_node)


def rate_candidates(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    parents: torch.Tensor,  # [max_num_reqs, max_num_merged] int32, -1: root
    proposers: torch.Tensor,  # [max_num_reqs, max_num_merged] int32, bit per proposer
    own_scores: torch.Tensor,  # [num_proposers, max_num_reqs, max_num_merged] float32
    num_merged: torch.Tensor,  # [max_num_reqs] int32
    sibling_bits: torch.Tensor,  # [max_num_reqs, max_num_merged] int32, bit per
    # proposer of any child of a node's parent
    slopes: torch.Tensor,  # [num_proposers * NUM_COMPANIES] float32
    offsets: torch.Tensor,  # as slopes
    is_drawn: torch.Tensor | None,  # [num_reqs] bool, the first proposer drew
    scores: torch.Tensor,  # out [max_num_reqs, max_num_merged] float32, path log-prob
) -> None:
    """Rate every merged node by what its proposers say of it, given its parent.

    A proposer says log-odds, which its voice in the node's company corrects by a slope
    and an offset. Of several the mean counts, and log-probs add up along a path. Scores
    that are no finite number say nothing, neither of the node nor of its children, and
    a node of which nobody speaks is -inf. In drawn rows the first proposer's nodes are
    certain and its own scores become -inf: they are none to learn from. Parents precede
    children. Columns past ``num_merged`` keep what they held.
    """
    num_proposers, *shape = own_scores.shape
    num_reqs = slots.shape[0]
    merged = (parents, proposers, own_scores[0], sibling_bits, scores)
    if len({(t.shape, t.stride()) for t in merged}) > 1:
        raise ValueError("the merged tensors must have one shape and one stride")
    for name, tensor in (("slopes", slopes), ("offsets", offsets)):
        if tensor.shape != (num_proposers * NUM_COMPANIES,):
            raise ValueError(
                f"{name} {tuple(tensor.shape)}, expected {NUM_COMPANIES} for each of "
                f"{num_proposers} proposers"
            )
    if is_drawn is not None and is_drawn.shape[0] < num_reqs:
        raise ValueError(f"is_drawn is shorter than {num_reqs} requests")
    if num_merged.shape[0] < shape[0]:
        raise ValueError(f"num_merged must have {shape[0]} slots")
    vectors = (slots, num_merged, slopes, offsets)
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in (*vectors, *merged)):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _rate_candidates_kernel[(num_reqs,)](
        slots,
        parents,
        proposers,
        own_scores,
        own_scores.stride(0),
        scores,
        scores.stride(0),
        num_merged,
        sibling_bits,
        slopes,
        offsets,
        is_drawn,
        num_proposers,
        BLOCK_NODES=max(triton.next_power_of_2(shape[1]), MIN_BLOCK),
        num_warps=1,  # gathers and reductions: within a warp they need no barrier
    )
