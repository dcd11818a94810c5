"""What every request said last, for those who look from the host."""

import torch
import triton
import triton.language as tl


@triton.jit
def _newest_tokens_kernel(
    slots_ptr,
    num_sampled_ptr,
    token_ids_ptr,
    token_ids_stride,
    num_tokens_ptr,
    newest_ptr,
    newest_stride,
    max_new,
    BLOCK_NEW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    count = tl.load(num_sampled_ptr + row)
    first = tl.load(num_tokens_ptr + slot) - count
    new = tl.arange(0, BLOCK_NEW)
    token_ids = tl.load(
        token_ids_ptr + slot * token_ids_stride + first + new, mask=new < count, other=0
    )
    newest_ptr += row * newest_stride
    tl.store(newest_ptr, count)
    tl.store(newest_ptr + 1 + new, token_ids, mask=new < max_new)


def newest_tokens(
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    num_sampled: torch.Tensor,  # [num_reqs] int32, at most max_new
    token_ids: torch.Tensor,  # [max_num_reqs, max_num_tokens] int32, whole texts
    num_tokens: torch.Tensor,  # [max_num_reqs] int32, of each slot's text
    newest: torch.Tensor,  # out [num_reqs, 1 + max_new] int32
) -> None:
    """Write how many tokens each request said last, then those, then zeros."""
    num_reqs, max_new = newest.shape[0], newest.shape[1] - 1
    if min(slots.shape[0], num_sampled.shape[0]) < num_reqs:
        raise ValueError(f"slots and num_sampled are shorter than {num_reqs} rows")
    if any(
        t.shape[-1] > 1 and t.stride(-1) != 1
        for t in (slots, num_sampled, token_ids, num_tokens, newest)
    ):
        raise ValueError("the last dimension of every tensor must be contiguous")
    _newest_tokens_kernel[(num_reqs,)](
        slots,
        num_sampled,
        token_ids,
        token_ids.stride(0),
        num_tokens,
        newest,
        newest.stride(0),
        max_new,
        BLOCK_NEW=triton.next_power_of_2(max(max_new, 1)),
    )
