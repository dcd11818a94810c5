import torch

from vllm_treespec.kernels.recycling import (
    BIN_WIDTH,
    LEAST_WEIGHT,
    MIX_BEFORE,
    MIX_TOKEN,
    NUM_BINS,
    SLOPE,
)


def is_of(token_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return (token_ids >= 0) & (token_ids < vocab_size)


def rows_of(
    before: torch.Tensor, token_ids: torch.Tensor, vocab_size: int, num_rows: int
) -> torch.Tensor:
    """``[2, ...]`` int64: the rows of the tokens alone and of the pairs."""
    nobody = num_rows - 1
    is_token = is_of(token_ids, vocab_size)
    is_pair = is_token & is_of(before, vocab_size)
    mixed = before * MIX_BEFORE + token_ids * MIX_TOKEN
    pairs = vocab_size + (mixed ^ (mixed >> 16)) % (nobody - vocab_size)
    return torch.stack(
        [torch.where(is_token, token_ids, nobody), torch.where(is_pair, pairs, nobody)]
    )


def owners_of_pairs(
    before: torch.Tensor, token_ids: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    return (before + 1) * vocab_size + token_ids


def look_up(
    before: torch.Tensor,
    token_ids: torch.Tensor,
    vocab_size: int,
    owners: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of each context, and whether it is a pair's."""
    tokens, pairs = rows_of(before, token_ids, vocab_size, owners.shape[0])
    is_pair = owners[pairs] == owners_of_pairs(before, token_ids, vocab_size)
    return torch.where(is_pair, pairs, tokens), is_pair


def log_weights(weights: torch.Tensor) -> torch.Tensor:
    return weights.clamp(min=LEAST_WEIGHT).log()


def bin_centres(device: torch.device) -> torch.Tensor:
    return -BIN_WIDTH * (torch.arange(NUM_BINS, device=device) + 0.5)


def log_rates(
    scores: torch.Tensor,  # [..., k]
    is_pair: torch.Tensor,  # [...]
    knots: torch.Tensor,  # [2, NUM_BINS]
) -> torch.Tensor:
    places = (scores / -BIN_WIDTH - 0.5).clamp(0, NUM_BINS - 1)
    below = places.long()
    first = NUM_BINS * is_pair.long()[..., None]
    above = (below + 1).clamp(max=NUM_BINS - 1)
    flat = knots.flatten()
    values = torch.lerp(flat[first + below], flat[first + above], places - below)
    last_centre = -BIN_WIDTH * (NUM_BINS - 0.5)
    return values + SLOPE * scores + (scores - last_centre).clamp(max=0.0)
