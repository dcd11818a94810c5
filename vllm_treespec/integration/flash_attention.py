"""FlashAttention serves requests without trees, where there is one that agrees with us.

Prompts are plainly causal, and vLLM would attend to them this way without us as well.
Every kind of layer is tried on a small batch at start-up, because a build of
FlashAttention may lack or misread what a layer asks for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

from vllm_treespec.core.attend import CausalTail
from vllm_treespec.kernels.reference.tree_attention import tree_attention as twin

logger = logging.getLogger(f"vllm.{__name__}")

VERSIONS = (2, 3)
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


class FlashAttention:
    """FlashAttention over a paged KV cache, for the requests of ``tail``."""

    tail: CausalTail | None = None  # of this step

    def __init__(
        self,
        attend: Callable[..., Any],  # vLLM's flash_attn_varlen_func
        version_for: Callable[[Heads], int | None],
        *,
        dtype: torch.dtype,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._attend = attend
        self._version_for = functools.cache(version_for)
        self._dtype = dtype
        self._block_size = block_size
        self._device = device
        self._verdicts: dict[Heads, bool] = {}

    def serves(self, heads: Heads) -> bool:
        """Whether it gives such a layer what our kernel gives."""
        if heads not in self._verdicts:
            verdict = self._version_for(heads) in VERSIONS and self._agrees(heads)
            self._verdicts[heads] = verdict
            logger.info(
                "Requests without trees attend by %s in layers of %s",
                "FlashAttention" if verdict else "our own kernel",
                heads,
            )
        return self._verdicts[heads]

    def attend(
        self,
        heads: Heads,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, head_size]
        value_cache: torch.Tensor,  # as key_cache
        output: torch.Tensor,  # as query, the tail's rows are written
        seq_lens: torch.Tensor,  # [num_reqs] int32
        block_table: torch.Tensor,  # [num_reqs, max_num_blocks] int32
        sinks: torch.Tensor | None,  # [num_heads]
    ) -> None:
        """Attention of the tail's rows."""
        tail = self.tail
        assert tail is not None, "only steps with a tail ask"
        window = (-1, -1)
        if heads.sliding_window is not None:
            window = (heads.sliding_window - 1, 0)
        self._attend(
            q=query[tail.tokens],
            # A single KV head may have any stride, but FlashAttention 3 looks at it.
            k=canonicalize_singleton_dim_strides(key_cache.transpose(1, 2)),
            v=canonicalize_singleton_dim_strides(value_cache.transpose(1, 2)),
            out=output[tail.tokens],
            cu_seqlens_q=tail.query_start_loc,
            max_seqlen_q=tail.max_query_len,
            seqused_k=seq_lens[tail.reqs],
            max_seqlen_k=tail.max_num_keys,
            softmax_scale=heads.scale,
            causal=True,
            window_size=list(window),
            softcap=heads.soft_cap or 0.0,
            block_table=block_table[tail.reqs],
            fa_version=self._version_for(heads),
            s_aux=sinks,
        )

    def _agrees(self, heads: Heads) -> bool:
        """Try it on two prompts, one of them begun, in both of vLLM's layouts."""
        query_lens, seq_lens = (21, 40), (21, 77)
        tail, self.tail = self.tail, _tail_of(query_lens, max(seq_lens), self._device)
        try:
            return all(
                self._agrees_on(heads, query_lens, seq_lens, heads_first=heads_first)
                for heads_first in (False, True)
            )
        # What a build without this combination raises, in Python or in C++.
        except (RuntimeError, TypeError, AssertionError) as error:
            logger.warning("FlashAttention does not take %s: %s", heads, error)
            return False
        finally:
            self.tail = tail

    def _agrees_on(
        self,
        heads: Heads,
        query_lens: tuple[int, ...],
        seq_lens: tuple[int, ...],
        *,
        heads_first: bool,
    ) -> bool:
        device, dtype = self._device, self._dtype
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            numbers = torch.randn(size, generator=generator, device=device)
            return numbers.to(dtype)

        num_blocks = [-(-seq_len // self._block_size) for seq_len in seq_lens]
        sizes = [sum(num_blocks), heads.num_kv_heads, self._block_size]
        if heads_first:
            cache = normal(*sizes, 2 * heads.head_size)
        else:
            sizes[1:] = reversed(sizes[1:])
            cache = normal(*sizes, 2 * heads.head_size).transpose(1, 2)
        blocks = torch.arange(sum(num_blocks), dtype=torch.int32, device=device).flip(0)
        table = torch.nn.utils.rnn.pad_sequence(
            list(blocks.split(num_blocks)), batch_first=True
        )
        query = normal(sum(query_lens), heads.num_heads, heads.head_size)
        sinks = normal(heads.num_heads) if heads.has_sinks else None
        lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
        key_cache, value_cache = cache.split(heads.head_size, dim=-1)
        output, expected = torch.zeros_like(query), torch.zeros_like(query)
        self.attend(heads, query, key_cache, value_cache, output, lengths, table, sinks)
        assert self.tail is not None, "set by the caller"
        no_trees = torch.zeros(len(seq_lens), 1, 1, dtype=torch.int32, device=device)
        twin(
            query,
            key_cache,
            value_cache,
            expected,
            self.tail.query_start_loc,
            lengths,
            table,
            no_trees[:, 0, 0],
            no_trees[:, 0],
            no_trees,
            max_query_len=max(query_lens),
            scale=heads.scale,
            sliding_window=heads.sliding_window,
            soft_cap=heads.soft_cap,
            sinks=sinks,
        )
        return torch.allclose(output, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _tail_of(
    query_lens: tuple[int, ...], max_num_keys: int, device: torch.device
) -> CausalTail:
    starts = torch.tensor((0, *query_lens), dtype=torch.int32, device=device)
    return CausalTail(
        reqs=slice(0, len(query_lens)),
        tokens=slice(0, sum(query_lens)),
        query_start_loc=starts.cumsum(0, dtype=torch.int32),
        max_query_len=max(query_lens),
        max_num_keys=max_num_keys,
        max_query_len_before=0,
    )


def find_flash_attention(
    vllm_config: VllmConfig, device: torch.device
) -> FlashAttention | None:
    """vLLM's own, on NVIDIA GPUs and for half precision; it takes nothing else."""
    dtype: torch.dtype = vllm_config.model_config.dtype
    if device.type != "cuda" or dtype.itemsize != 2 or torch.version.hip is not None:
        return None
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
    )

    def version_for(heads: Heads) -> int | None:
        version: int | None = get_flash_attn_version(
            head_size=heads.head_size,
            has_sinks=heads.has_sinks,
            requires_softcap=heads.soft_cap is not None,
        )
        return version

    return FlashAttention(
        flash_attn_varlen_func,
        version_for,
        dtype=dtype,
        block_size=vllm_config.cache_config.block_size,
        device=device,
    )
