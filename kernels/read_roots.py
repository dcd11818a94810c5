"""The two newest tokens of every request: what the table is asked about."""

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.successors import NONE


@triton.jit(do_not_specialize=["num_reqs"])
def _read_roots_kernel(
    slots_ptr,
    num_tokens_ptr,
    texts_ptr,
    texts_stride,
    roots_ptr,
    num_reqs,
    BLOCK_REQS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_REQS + tl.arange(0, BLOCK_REQS)
    is_req = rows < num_reqs
    slots = tl.load(slots_ptr + rows, mask=is_req, other=0).to(tl.int64)
    newest = tl.load(num_tokens_ptr + slots, mask=is_req, other=0) - 1
    ends_ptr = texts_ptr + slots * texts_stride + newest
    root = tl.load(ends_ptr, mask=is_req & (newest >= 0), other=NONE)
    before = tl.load(ends_ptr - 1, mask=is_req & (newest > 0), other=NONE)
    tl.store(roots_ptr + rows, before.to(tl.int64), mask=is_req)
    tl.store(roots_ptr + num_reqs + rows, root.to(tl.int64), mask=is_req)


def read_roots(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    num_tokens: torch.Tensor,  # [max_num_reqs] int32, of each slot's text
    texts: torch.Tensor,  # [max_num_reqs, max_len] int32, whole texts
    roots: torch.Tensor,  # out [2, num_reqs] int64: the newest token, after which
) -> None:
    """Find the newest token and the one before it, NONE where there is none."""
    num_reqs = roots.shape[1]
    if slots.shape[0] < num_reqs or not roots.is_contiguous():
        raise ValueError(f"roots must be contiguous, and slots have {num_reqs} rows")
    _read_roots_kernel[(triton.cdiv(num_reqs, 32),)](
        slots,
        num_tokens,
        texts,
        texts.stride(0),
        roots,
        num_reqs,
        BLOCK_REQS=32,
        num_warps=1,
    )
