"""Small batches on which FlashAttention has to agree with the torch twin of our kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_treespec.core.attend import CausalTail
from vllm_treespec.kernels.reference.tree_attention import tree_attention as twin

QUERY_LENS, SEQ_LENS = (
    (21, 30),
    (21, 107),
)  # a request that begins, and one that goes on
TOLERANCE = 2e-2  # of half precision; a wrong mask is off by far more


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """A kind of attention layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None  # tokens a query sees, itself included
    soft_cap: float | None
    has_sinks: bool


@dataclass(frozen=True, slots=True)
class Trial:
    """A batch of two requests without trees."""

    arguments: dict[str, Any]  # of ``tree_attention``, less the output

    @property
    def tail(self) -> CausalTail:
        """Both requests."""
        return CausalTail(
            reqs=slice(0, len(SEQ_LENS)),
            tokens=slice(0, sum(QUERY_LENS)),
            query_start_loc=self.arguments["query_start_loc"],
            max_query_len=max(QUERY_LENS),
            max_num_keys=max(SEQ_LENS),
            max_query_len_before=0,
        )

    def agrees(self, attend: Callable[..., None]) -> bool:
        """Whether ``attend`` writes what the twin does."""
        output, expected = (torch.zeros_like(self.arguments["query"]) for _ in range(2))
        twin(**self.arguments, output=expected)
        attend(**self.arguments, output=output)
        return torch.allclose(output, expected, rtol=TOLERANCE, atol=TOLERANCE)


def trials(
    heads: Heads, dtype: torch.dtype, block_size: int, device: torch.device
) -> Iterator[Trial]:
    """One for each of vLLM's layouts of the cache."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def integers(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    longest = max(QUERY_LENS)
    num_blocks = [-(-seq_len // block_size) for seq_len in SEQ_LENS]
    block_table = integers([[0] * max(num_blocks)] * len(SEQ_LENS))
    # Blocks in no natural order.
    block_table[0, : num_blocks[0]] = integers(range(num_blocks[0])).flip(0)
    block_table[1, : num_blocks[1]] = integers(range(num_blocks[0], sum(num_blocks)))
    arguments = {
        "query": normal(sum(QUERY_LENS), heads.num_heads, heads.head_size),
        "query_start_loc": integers((0, *QUERY_LENS)).cumsum(0, dtype=torch.int32),
        "seq_lens": integers(SEQ_LENS),
        "block_table": block_table,
        "num_nodes": integers([0, 0]),
        "depths": integers([[0], [0]]),
        "masks": integers([[[0]], [[0]]]),
        "max_query_len": longest,
        "scale": heads.scale,
        "sliding_window": heads.sliding_window,
        "soft_cap": heads.soft_cap,
        "sinks": normal(heads.num_heads) if heads.has_sinks else None,
    }
    width = 2 * heads.head_size
    for cache in (
        normal(sum(num_blocks), heads.num_kv_heads, block_size, width),
        normal(sum(num_blocks), block_size, heads.num_kv_heads, width).transpose(1, 2),
    ):
        yield Trial(
            arguments
            | {
                "key_cache": cache[..., : heads.head_size],
                "value_cache": cache[..., heads.head_size :],
            }
        )
