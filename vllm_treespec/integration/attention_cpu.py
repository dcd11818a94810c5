"""The tree backend on vLLM's CPU platform, for tests and demos."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
)

from vllm_treespec.integration.attention import TreeForward, TreeMetadata
from vllm_treespec.kernels.host_attention import host_attention


class TreeMetadataBuilder(AttentionMetadataBuilder[TreeMetadata]):
    """vLLM's own CPU builder would plan the work of a kernel we do not run."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
    ) -> TreeMetadata:
        common = common_attn_metadata
        return TreeMetadata(
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            max_query_len=common.max_query_len,
        )


class TreeAttentionImpl(TreeForward, CPUAttentionBackendImpl):
    @property
    def fp8_dtype(self) -> torch.dtype:  # type: ignore[override]
        is_e5m2 = self.kv_cache_dtype == "fp8_e5m2"
        return torch.float8_e5m2 if is_e5m2 else torch.float8_e4m3fn

    def _attention(self, metadata: Any) -> Callable[..., None]:
        attend = super()._attention(metadata)
        if attend is host_attention:
            return partial(attend, plans=metadata.plans)
        return attend

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        slot_mapping: torch.Tensor,  # [num_tokens] int64, -1: padding
    ) -> None:
        # vLLM's CPU kernel stores keys transposed in tiles; compaction moves rows.
        metadata = get_forward_context().attn_metadata
        assert isinstance(metadata, dict), "a list is of microbatches, on GPUs only"
        plans = metadata[layer.layer_name].plans
        num_tokens, num_kv_heads, _ = key.shape
        if (plan := ("writes", num_kv_heads)) not in plans:
            plans[plan] = _places(slot_mapping[:num_tokens], *kv_cache.shape[1:3])
        used, places = plans[plan]
        if used is not None:
            key, value = key[used], value[used]
        if self._is_quantized:
            key = _quantize(key / layer._k_scale, self.fp8_dtype)
            value = _quantize(value / layer._v_scale, self.fp8_dtype)
        rows = torch.cat([key, value], dim=-1).to(kv_cache.dtype).flatten(0, 1)
        kv_cache.view(-1, kv_cache.shape[3]).index_copy_(0, places, rows)


def _places(
    slots: torch.Tensor,  # [num_tokens] int64, -1: padding
    num_kv_heads: int,
    block_size: int,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Tokens that are no padding, None: all; and where the flat cache keeps each head of
    each of them."""
    used = slots >= 0
    slots = slots[used]
    first = slots // block_size * num_kv_heads * block_size + slots % block_size
    heads = torch.arange(num_kv_heads) * block_size
    places = (first[:, None] + heads).flatten()
    return None if bool(used.all()) else used, places


def _quantize(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes that vLLM's CPU kernel stores: saturated, and rounded towards zero."""
    most = torch.finfo(dtype).max
    numbers = numbers.float().clamp(-most, most)
    nearest = numbers.to(dtype)
    is_above = nearest.float().abs() > numbers.abs()
    return nearest.view(torch.uint8) - is_above.to(torch.uint8)


class TreeAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TreeAttentionImpl]:
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeMetadataBuilder]:
        return TreeMetadataBuilder
