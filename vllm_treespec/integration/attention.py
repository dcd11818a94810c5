"""Attention through the tree kernel, whatever vLLM backend carries it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from vllm_treespec.config import ConfigError
from vllm_treespec.core.attend import BatchTrees, CausalTail
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.integration.engine_args import CACHE_DTYPES, FP8_CACHES
from vllm_treespec.integration.flash_attention import FlashAttention
from vllm_treespec.integration.flash_trial import Heads

# Backends are named by path, because a file of the other platform cannot be imported.
_CPU = "vllm_treespec.integration.attention_cpu.TreeAttentionBackend"
_GPU = "vllm_treespec.integration.attention_gpu.TreeAttentionBackend"


@dataclass(frozen=True, slots=True)
class TreeMetadata:
    """What the tree kernel needs to know about a batch, beside its trees."""

    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    seq_lens: torch.Tensor  # [num_reqs] int32
    block_table: torch.Tensor  # [num_reqs, max_num_blocks] int32
    max_query_len: int
    trees: BatchTrees | None = None  # else those that the layer is bound to
    # What a layer has worked out about the batch, for those after it.
    plans: dict[Any, Any] = field(default_factory=dict)


class TreeForward:
    """Mixed into a vLLM attention implementation: attends through the tree kernel."""

    head_size: int
    scale: float
    kv_cache_dtype: str
    fp8_dtype: torch.dtype  # what a quantized cache's bytes are
    sinks: torch.Tensor | None  # [num_heads]
    _kernels: KernelSet
    _batch: BatchTrees
    _flash: FlashAttention | None  # for rows without trees, where it serves this layer

    def bind(
        self,
        kernels: KernelSet,
        batch: BatchTrees,
        sliding_window: int | None,
        flash: FlashAttention | None = None,
    ) -> None:
        """Say which trees this layer's queries form.

        Args:
            sliding_window: tokens a query sees, itself included; None for all.
            flash: takes requests without trees, if it is right for such a layer.

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
        self._is_quantized = self.kv_cache_dtype in FP8_CACHES
        self._heads = Heads(
            num_heads=self.num_heads,  # type: ignore[attr-defined]
            num_kv_heads=self.num_kv_heads,  # type: ignore[attr-defined]
            head_size=self.head_size,
            scale=self.scale,
            sliding_window=self._window,
            soft_cap=self._soft_cap,
            has_sinks=self.sinks is not None,
        )
        self._flash = None
        if flash is not None and not self._is_quantized and flash.serves(self._heads):
            self._flash = flash

    def _attention(self, metadata: Any) -> Callable[..., None]:
        """The kernel for this batch."""
        return self._kernels.tree_attention

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
        scales: dict[str, Any] = {}
        if self._is_quantized:
            kv_cache = kv_cache.view(self.fp8_dtype)
            scales = {"key_scale": layer._k_scale, "value_scale": layer._v_scale}
        key_cache, value_cache = torch.split(kv_cache, self.head_size, dim=-1)
        rows, attended, attend = attn_metadata, output, self._attention(attn_metadata)
        trees = getattr(attn_metadata, "trees", None)
        flash = self._flash if trees is None else None  # a draft brings its own
        if flash is not None and (tail := flash.tail) is not None:
            flash.attend_tail(
                self._heads,
                query,
                key_cache,
                value_cache,
                output,
                rows.seq_lens,
                rows.block_table,
                self.sinks,
            )
            rows = _rows_before(tail, attn_metadata)
            query = query[: tail.tokens.start]
            attended = output[: tail.tokens.start]
        batch = trees or self._batch
        attend(
            query,
            key_cache,
            value_cache,
            attended,
            rows.query_start_loc,
            rows.seq_lens,
            rows.block_table,
            batch.num_nodes,
            batch.depths,
            batch.masks,
            max_query_len=rows.max_query_len,
            scale=self.scale,
            sliding_window=self._window,
            soft_cap=self._soft_cap,
            sinks=self.sinks,
            **scales,
        )
        return output


def _rows_before(tail: CausalTail, metadata: Any) -> TreeMetadata:
    num_reqs = tail.reqs.start
    return TreeMetadata(
        query_start_loc=metadata.query_start_loc[: num_reqs + 1],
        seq_lens=metadata.seq_lens[:num_reqs],
        block_table=metadata.block_table[:num_reqs],
        max_query_len=tail.max_query_len_before,
    )


def bind_layer(
    name: str,
    layer: Any,
    kernels: KernelSet,
    batch: BatchTrees,
    flash: FlashAttention | None = None,
) -> None:
    """Let one of a model's attention layers see trees.

    Raises:
        ConfigError: if it is not plain causal attention.
    """
    # Subclasses chunk or cross: their metadata describe no tree.
    if type(layer) is not Attention or not isinstance(layer.impl, TreeForward):
        raise ConfigError(
            f"layer {name} is a {type(layer).__name__}, which does not know trees"
        )
    layer.impl.bind(kernels, batch, layer.sliding_window, flash)


def _missing_features(impl: Any) -> Iterable[str]:
    if impl.attn_type != AttentionType.DECODER:
        yield f"attention type {impl.attn_type!r} is not causal decoding"
    if impl.alibi_slopes is not None:
        yield "ALiBi biases are not supported on trees"
    if impl.kv_cache_dtype not in CACHE_DTYPES:
        yield (
            f"a KV cache of {impl.kv_cache_dtype!r} has no tree kernel, "
            f"use one of {', '.join(CACHE_DTYPES)}"
        )


@contextmanager
def tree_backend(vllm_config: VllmConfig) -> Iterator[None]:
    """Attention layers made inside get the tree backend, those made outside do not.

    A later engine of the same process may run without trees.
    """
    on_cpu = current_platform.is_cpu()
    # vLLM's CPU platform knows one backend only; a GPU takes a custom one.
    member = AttentionBackendEnum.CPU_ATTN if on_cpu else AttentionBackendEnum.CUSTOM
    register_backend(member, _CPU if on_cpu else _GPU)
    attention_config = vllm_config.attention_config
    chosen = attention_config.backend
    attention_config.backend = member
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        attention_config.backend = chosen
        member.clear_override()
        _cached_get_attn_backend.cache_clear()
