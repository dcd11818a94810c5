import torch

from vllm_treespec.kernels.perturb_logits import SALT

MASK = 0xFFFFFFFF
ULP = 5.9604645e-08  # 2 ** -24


def perturb_logits(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    is_drawn: torch.Tensor,
    first_node: int,
    noisy: torch.Tensor,
) -> None:
    num_reqs, (num_logits, vocab_size) = positions.shape[0], logits.shape
    num_rows = num_logits // num_reqs
    drawn = is_drawn[:num_reqs, None, None]
    divisors = torch.where(drawn, temperatures[:num_reqs, None, None], 1.0)
    scaled = logits.float().view(num_reqs, num_rows, vocab_size) / divisors
    seeds = seeds[:num_reqs]
    key = _mix((seeds & MASK) ^ SALT)
    key = _mix(key ^ (seeds >> 32 & MASK))
    key = _mix(key ^ (positions.long() & MASK))
    nodes = first_node + torch.arange(num_rows, device=logits.device)
    key = _mix(key[:, None] ^ nodes)[:, :, None]
    noise = _gumbel(key, torch.arange(vocab_size, device=logits.device))
    noisy.copy_((scaled + torch.where(drawn, noise, 0.0)).view(num_logits, vocab_size))


def _gumbel(key: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    high = _mix(key ^ tokens) >> 8
    low = _mix(high ^ _mix((key + tokens) & MASK)) >> 8
    uniform = (high.float() + (low.float() + 0.5) * ULP) * ULP
    small = uniform + uniform * uniform * 0.5
    exponential = -torch.log((1.0 - uniform).clamp(min=1e-38))
    return -torch.log(torch.where(uniform < 1e-3, small, exponential))


def _mix(value: torch.Tensor) -> torch.Tensor:
    """On int64 that holds 32 bits."""
    value = value ^ (value >> 16)
    value = value * 0x7FEB352D & MASK
    value = value ^ (value >> 15)
    value = value * 0x846CA68B & MASK
    return value ^ (value >> 16)
