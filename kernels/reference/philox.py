"""Triton's random numbers in torch, so that a twin decides as its kernel does."""

import torch

# As in residuals.py, which only imports where Triton does.
SEED_SALT = 0x5EED_0F_7E57_ACC3
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


def philox(
    seeds: torch.Tensor,  # int64
    counters: torch.Tensor,  # int64, of the same shape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 as ``tl.randint4x``: four words in [0, 2**32), int64."""
    # A product of words may wrap around int64; its 64 bits are right all the same.
    word_0, word_1 = counters & WORD, (counters >> 32) & WORD
    word_2 = word_3 = torch.zeros_like(counters)
    key_0, key_1 = seeds & WORD, (seeds >> 32) & WORD
    for _ in range(10):
        product_0, product_2 = word_0 * ROUND_A, word_2 * ROUND_B
        word_0 = ((product_2 >> 32) & WORD) ^ word_1 ^ key_0
        word_2 = ((product_0 >> 32) & WORD) ^ word_3 ^ key_1
        word_1, word_3 = product_2 & WORD, product_0 & WORD
        key_0, key_1 = (key_0 + KEY_A) & WORD, (key_1 + KEY_B) & WORD
    return word_0, word_1, word_2, word_3


def uniform(
    seeds: torch.Tensor,  # int64
    positions: torch.Tensor,  # int64, below 2**31
    uses: torch.Tensor,  # int64, below 2**32
) -> torch.Tensor:
    """float64 in [0, 1) with 53 random bits, as ``residuals.uniform``."""
    high, low, _, _ = philox(seeds ^ SEED_SALT, (positions << 32) | uses)
    return ((high >> 5 << 26) | low >> 6).double() * 2.0**-53
