"""Attention backends whose forward sees trees: one on vLLM's CPU, one on its Triton."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionMetadataBuilder, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from vllm_treespec.config import ConfigError
from vllm_treespec.core.attend import BatchTrees
from vllm_treespec.core.kernel_set import KernelSet


class TreeForward:
    """Mixed into a vLLM attention implementation: attends through the tree kernel."""

    head_size: int
    scale: float
    _kernels: KernelSet
    _batch: BatchTrees

    def bind(
        self, kernels: KernelSet, batch: BatchTrees, sliding_window: int | None
    ) -> None:
        """Say which trees this layer's queries form.

        Args:
            sliding_window: tokens a query sees, itself included; None for all.

        Raises:
            ConfigError: if the layer needs something the tree kernel lacks.
        """
        if problems := list(_missing_features(self)):
            raise ConfigError("treespec cannot attend: " + "; ".join(problems))
        self._kernels = kernels
        self._batch = batch
        self._window = sliding_window
        soft_cap = self.logits_soft_cap  # type: ignore[attr-defined]  # of the host
        self._soft_cap = soft_cap if soft_cap else None

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        attn_metadata: Any,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # a profiling run has no keys to see
            return output.fill_(0)
        assert output_scale is None, "fused output quantization is not announced"
        key_cache, value_cache = kv_cache.split(self.head_size, dim=-1)
        batch = self._batch
        self._kernels.tree_attention(
            query,
            key_cache,
            value_cache,
            output,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            batch.num_nodes,
            batch.depths,
            batch.masks,
            max_query_len=attn_metadata.max_query_len,
            scale=self.scale,
            sliding_window=self._window,
            soft_cap=self._soft_cap,
        )
        return output


def _missing_features(impl: Any) -> Iterable[str]:
    if impl.attn_type != AttentionType.DECODER:
        yield f"attention type {impl.attn_type!r} is not causal decoding"
    if impl.alibi_slopes is not None:
        yield "ALiBi biases are not supported on trees"
    if impl.sinks is not None:
        yield "attention sinks are not supported on trees"


if current_platform.is_cpu():
    from vllm.v1.attention.backends.cpu_attn import (
        CPUAttentionBackend,
        CPUAttentionBackendImpl,
    )

    OVERRIDDEN = AttentionBackendEnum.CPU_ATTN

    @dataclass
    class TreeMetadata:
        """What the tree kernel reads of vLLM's common attention metadata."""

        query_start_loc: torch.Tensor  # [num_reqs + 1] int32
        seq_lens: torch.Tensor  # [num_reqs] int32
        block_table: torch.Tensor  # [num_reqs, max_num_blocks] int32
        slot_mapping: torch.Tensor  # [num_tokens] int64, -1: padding
        max_query_len: int

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
                slot_mapping=common.slot_mapping,
                max_query_len=common.max_query_len,
            )

    class TreeAttentionImpl(TreeForward, CPUAttentionBackendImpl):
        def do_kv_cache_update(
            self,
            layer: torch.nn.Module,
            key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
            value: torch.Tensor,
            kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head]
            slot_mapping: torch.Tensor,  # [num_tokens] int64, -1: padding
        ) -> None:
            # vLLM's CPU kernel stores keys transposed in tiles; compaction moves rows.
            used = slot_mapping[: key.shape[0]] >= 0
            slots = slot_mapping[: key.shape[0]][used]
            block_size = kv_cache.shape[2]
            rows = torch.cat([key[used], value[used]], dim=-1)
            kv_cache[slots // block_size, :, slots % block_size] = rows.to(
                kv_cache.dtype
            )

    class TreeAttentionBackend(CPUAttentionBackend):
        @staticmethod
        def get_impl_cls() -> type[TreeAttentionImpl]:
            return TreeAttentionImpl

        @staticmethod
        def get_builder_cls() -> type[TreeMetadataBuilder]:  # type: ignore[override]
            return TreeMetadataBuilder

else:
    from vllm.v1.attention.backends.triton_attn import (
        TritonAttentionBackend,
        TritonAttentionImpl,
    )

    OVERRIDDEN = AttentionBackendEnum.CUSTOM

    class TreeAttentionImpl(TreeForward, TritonAttentionImpl):  # type: ignore[no-redef]
        def fused_output_quant_supported(self, quant_key: Any) -> bool:
            return False

    class TreeAttentionBackend(TritonAttentionBackend):  # type: ignore[no-redef]
        @staticmethod
        def get_name() -> str:
            return "CUSTOM"

        @staticmethod
        def get_impl_cls() -> type[TreeAttentionImpl]:
            return TreeAttentionImpl

        @classmethod
        def supports_sink(cls) -> bool:
            return False


@contextmanager
def tree_backend(vllm_config: VllmConfig) -> Iterator[None]:
    """Attention layers made inside get the tree backend, those made outside do not.

    A later engine of the same process may run without trees.
    """
    register_backend(
        OVERRIDDEN, f"{TreeAttentionBackend.__module__}.{TreeAttentionBackend.__name__}"
    )
    attention_config = vllm_config.attention_config
    chosen = attention_config.backend
    attention_config.backend = OVERRIDDEN
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        attention_config.backend = chosen
        OVERRIDDEN.clear_override()
        _cached_get_attn_backend.cache_clear()
