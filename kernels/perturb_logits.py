"""Gumbel noise on a draft's logits: the best k become k draws without replacement."""

import torch
import triton
import triton.language as tl

BLOCK_VOCAB = 4096
# Keeps this noise apart from any other use of the same seeds and positions.
SALT = 0x51AB3D27


@triton.jit
def _mix(value):
    """A bijection of 32 bits in which every input bit reaches every output bit
    (lowbias32: C. Wellons, Prospecting for Hash Functions, 2018)."""
    value = value ^ (value >> 16)
    value = value * 0x7FEB352D
    value = value ^ (value >> 15)
    value = value * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def _perturb_logits_kernel(
    logits_ptr,
    logits_stride,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    is_drawn_ptr,
    first_node,
    num_rows,
    noisy_ptr,
    noisy_stride,
    vocab_size,
    SALT: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    is_token = tokens < vocab_size
    req = row // num_rows
    logits = tl.load(
        logits_ptr + row * logits_stride + tokens, mask=is_token, other=0.0
    )
    logits = logits.to(tl.float32)
    noise = tl.full([BLOCK_VOCAB], 0.0, tl.float32)
    if tl.load(is_drawn_ptr + req) != 0:
        logits = logits / tl.load(temperatures_ptr + req)
        seed = tl.load(seeds_ptr + req).to(tl.int64)
        node = (first_node + row % num_rows).to(tl.uint32)
        key = _mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ SALT)
        key = _mix(key ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
        key = _mix(key ^ tl.load(positions_ptr + req).to(tl.uint32))
        key = _mix(key ^ node)
        # The two halves of 48 bits: the tail of the noise decides who wins.
        high = _mix(key ^ tokens.to(tl.uint32)) >> 8
        low = _mix(high ^ _mix(key + tokens.to(tl.uint32))) >> 8
        uniform = (high.to(tl.float32) + (low.to(tl.float32) + 0.5) * 5.9604645e-08) * (
            5.9604645e-08
        )
        # Large noise comes from small uniforms, where float32 is finest.
        exponential = tl.where(uniform < 0.5, uniform + uniform * uniform * 0.5, 0.0)
        # 1e-37: below float32's least normal number, a literal may become a float64.
        exponential = tl.where(
            uniform < 1e-3, exponential, -tl.log(tl.maximum(1.0 - uniform, 1e-37))
        )
        noise = -tl.log(exponential)
    tl.store(noisy_ptr + row * noisy_stride + tokens, logits + noise, mask=is_token)


def perturb_logits(
    logits: torch.Tensor,  # [num_reqs * num_rows, vocab_size] float
    temperatures: torch.Tensor,  # [max_num_reqs] float32, > 0
    seeds: torch.Tensor,  # [max_num_reqs] int64
    positions: torch.Tensor,  # [num_reqs] int32
    is_drawn: torch.Tensor,  # [max_num_reqs] bool
    first_node: int,  # node of a request's first row
    noisy: torch.Tensor,  # out [num_reqs * num_rows, vocab_size] float32
) -> None:
    """Divide by the temperature and add standard Gumbel noise.

    The noise is a function of the request's seed, its position, the node and the token.
    Rows of requests that are not drawn for come back as they are.
    """
    num_reqs = positions.shape[0]
    num_logits, vocab_size = logits.shape
    if num_reqs == 0 or num_logits % num_reqs:
        raise ValueError(f"{num_logits} rows of logits for {num_reqs} requests")
    if noisy.shape != logits.shape:
        raise ValueError(
            f"noisy {tuple(noisy.shape)} must be as logits {tuple(logits.shape)}"
        )
    if logits.stride(1) != 1 or noisy.stride(1) != 1:
        raise ValueError("the last dimension of both must be contiguous")
    block = min(BLOCK_VOCAB, triton.next_power_of_2(vocab_size))
    _perturb_logits_kernel[(num_logits, triton.cdiv(vocab_size, block))](
        logits,
        logits.stride(0),
        temperatures,
        seeds,
        positions,
        is_drawn,
        first_node,
        num_logits // num_reqs,
        noisy,
        noisy.stride(0),
        vocab_size,
        SALT=SALT,
        BLOCK_VOCAB=block,
    )
