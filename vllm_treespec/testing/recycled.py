"""A table of successors and contexts that meet in it, for the tests of its kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_treespec.kernels.recycling import NONE

VOCAB_SIZE, NUM_PAIRS = 29, 11  # pairs share rows


class Table(NamedTuple):
    owners: torch.Tensor
    token_ids: torch.Tensor
    weights: torch.Tensor


def empty_table(k: int, device: torch.device) -> Table:
    num_rows = VOCAB_SIZE + NUM_PAIRS + 1
    return Table(
        torch.full((num_rows,), NONE, device=device),
        torch.full((num_rows, k), NONE, dtype=torch.int32, device=device),
        torch.zeros(num_rows, k, device=device),
    )


def random_contexts(
    num: int, gen: torch.Generator, num_tokens: int = VOCAB_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some begin a text, some are padding, some are no tokens of this vocabulary."""
    before, token_ids = torch.randint(num_tokens, (2, num), generator=gen)
    before[torch.rand(num, generator=gen) < 0.1] = NONE
    token_ids[torch.rand(num, generator=gen) < 0.1] = NONE
    token_ids[torch.rand(num, generator=gen) < 0.1] = VOCAB_SIZE
    before[torch.rand(num, generator=gen) < 0.1] = 2**31 - 1
    return before, token_ids


def random_successors(
    num: int, width: int, gen: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct tokens int32 and weights."""
    drawn = torch.rand(num, VOCAB_SIZE, generator=gen)
    return drawn.topk(width).indices.int(), torch.rand(
        num, width, generator=gen
    ) / width
