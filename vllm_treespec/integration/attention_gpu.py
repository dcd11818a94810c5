"""The tree backend on a GPU: vLLM's Triton backend with another forward."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
)

from vllm_treespec.integration.attention import TreeForward


class TreeAttentionImpl(TreeForward, TritonAttentionImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Else vLLM quantizes queries where it quantizes the cache.
        self.supports_quant_query_input = False

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False


class TreeAttentionBackend(TritonAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TreeAttentionImpl]:
        return TreeAttentionImpl

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False
