"""What merged candidates are worth, by what their proposers' scores were worth."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.bins import NUM_BINS, NUM_COMPANIES
from vllm_treespec.kernels.calibration import calibrated, company_rows, is_finite


@triton.jit
def _rate_candidates_kernel(
    slots_ptr,
    proposers_ptr,
    own_scores_ptr,
    own_scores_proposer_stride,
    scores_ptr,
    merged_stride,
    num_merged_ptr,
    offering_ptr,
    knots_ptr,
    is_drawn_ptr,
    num_proposers,
    BLOCK_NODES: tl.constexpr,
):
    req = tl.program_id(0)
    slot = tl.load(slots_ptr + req).to(tl.int64)
    offering = tl.load(offering_ptr + slot)
    is_drawn = tl.full((), 0, tl.int1)
    if is_drawn_ptr is not None:
        is_drawn = tl.load(is_drawn_ptr + req).to(tl.int1)
    nodes = tl.arange(0, BLOCK_NODES)
    is_node = nodes < tl.load(num_merged_ptr + slot)
    columns = slot * merged_stride + nodes
    bits = tl.load(proposers_ptr + columns, mask=is_node, other=0)

    sums = tl.full([BLOCK_NODES], 0.0, tl.float32)
    counts = tl.full([BLOCK_NODES], 0.0, tl.float32)
    for proposer in range(num_proposers):
        is_draw = is_drawn & (proposer == 0)
        tl.store(
            own_scores_ptr + columns,
            tl.full([BLOCK_NODES], float("-inf"), tl.float32),
            mask=is_node & is_draw,
        )
        own_scores = tl.load(
            own_scores_ptr + columns, mask=is_node & (is_draw == 0), other=float("-inf")
        )
        is_scored = is_finite(own_scores)
        # what is no number has no bin
        own_scores = tl.where(is_scored, own_scores, 0.0)
        rows = company_rows(bits, proposer, offering)
        values = calibrated(own_scores, rows, knots_ptr, is_scored)
        sums += tl.where(is_scored, values, 0.0)
        counts += is_scored.to(tl.float32)
        own_scores_ptr += own_scores_proposer_stride

    scores = tl.where(counts > 0, sums / tl.maximum(counts, 1.0), float("-inf"))
    scores = tl.where(is_drawn & ((bits & 1) != 0), 0.0, scores)
    tl.store(scores_ptr + columns, scores, mask=is_node)


def rate_candidates(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    proposers: torch.Tensor,  # [max_num_reqs, max_num_merged] int32, bit per proposer
    own_scores: torch.Tensor,  # [num_proposers, max_num_reqs, max_num_merged] float32
    num_merged: torch.Tensor,  # [max_num_reqs] int32
    offering: torch.Tensor,  # [max_num_reqs] int32, bit per proposer with candidates
    knots: torch.Tensor,  # [num_proposers * NUM_COMPANIES, NUM_BINS] float32
    is_drawn: torch.Tensor | None,  # [num_reqs] bool, the first proposer drew
    scores: torch.Tensor,  # out [max_num_reqs, max_num_merged] float32, path log-prob
) -> None:
    """Rate every merged node by those who proposed it, each calibrated for the company
    that the node has.

    Of several the mean counts; scores that are no finite number say nothing, and a node
    without others is -inf. In drawn rows the first proposer's nodes are certain and
    its own scores become -inf: they are none to learn from. Columns past ``num_merged``
    keep what they held.
    """
    num_proposers, *shape = own_scores.shape
    num_reqs = slots.shape[0]
    merged = (proposers, own_scores[0], scores)
    if len({(t.shape, t.stride()) for t in merged}) > 1:
        raise ValueError("the merged tensors must have one shape and one stride")
    if knots.shape != (num_proposers * NUM_COMPANIES, NUM_BINS):
        raise ValueError(
            f"knots {tuple(knots.shape)}, expected {NUM_COMPANIES} rows of {NUM_BINS} "
            f"for each of {num_proposers} proposers"
        )
    if not knots.is_contiguous():
        raise ValueError("knots must be contiguous")
    if is_drawn is not None and is_drawn.shape[0] < num_reqs:
        raise ValueError(f"is_drawn is shorter than {num_reqs} requests")
    if min(num_merged.shape[0], offering.shape[0]) < shape[0]:
        raise ValueError(f"num_merged and offering must have {shape[0]} slots")
    vectors = (slots, num_merged, offering)
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in (*vectors, *merged)):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _rate_candidates_kernel[(num_reqs,)](
        slots,
        proposers,
        own_scores,
        own_scores.stride(0),
        scores,
        scores.stride(0),
        num_merged,
        offering,
        knots,
        is_drawn,
        num_proposers,
        BLOCK_NODES=triton.next_power_of_2(shape[1]),
    )
