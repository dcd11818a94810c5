"""The tree backend on vLLM's CPU platform, for tests and demos."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
)

from vllm_treespec.integration.attention import TreeForward, TreeMetadata


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

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        slot_mapping: torch.Tensor,  # [num_tokens] int64, -1: padding
    ) -> None:
        # vLLM's CPU kernel stores keys transposed in tiles; compaction moves rows.
        used = slot_mapping[: key.shape[0]] >= 0
        slots = slot_mapping[: key.shape[0]][used]
        block_size = kv_cache.shape[2]
        key, value = key[used], value[used]
        if self._is_quantized:
            key = _quantize(key / layer._k_scale, self.fp8_dtype)
            value = _quantize(value / layer._v_scale, self.fp8_dtype)
        rows = torch.cat([key, value], dim=-1).to(kv_cache.dtype)
        kv_cache[slots // block_size, :, slots % block_size] = rows


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
