"""FlashAttention takes what needs no tree, where there is one that agrees with us.

Requests without trees are plainly causal, and vLLM would attend to them this way without us
as well. Of requests with trees it can take the keys of earlier steps, which all rows see;
where that was measured to be faster, the table of tiles says so. Every kind of layer is
tried on a small batch at start-up, because a build of FlashAttention may lack or misread
what a layer asks for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

from vllm_treespec.core.attend import CausalTail, causal_tail
from vllm_treespec.integration.flash_trial import Heads, Trial, trials

logger = logging.getLogger(f"vllm.{__name__}")

VERSIONS = (2, 3, 4)  # whose arguments are known; whether one is right is tried


class FlashAttention:
    """FlashAttention over a paged KV cache, for parts of a step's work."""

    tail: CausalTail | None = None  # requests of this step without trees

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

    def begin(self, input_batch: Any, *, is_graph: bool) -> None:
        """Say what this step's forward is for.

        Args:
            input_batch: vLLM's ``InputBatch``.
            is_graph: whether it is captured or replayed, for batches of which the host
                decides nothing.
        """
        self.tail = None
        if not is_graph:
            self.tail = causal_tail(
                input_batch.cu_num_logits_np[: input_batch.num_reqs + 1],
                input_batch.query_start_loc_np,
                input_batch.query_start_loc,
                input_batch.seq_lens_cpu_upper_bound.numpy(),
            )

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

    def attend_tail(
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
        """Attention of the requests without trees."""
        tail = self.tail
        assert tail is not None, "only steps with a tail ask"
        window = [-1, -1]
        if heads.sliding_window is not None:
            window = [heads.sliding_window - 1, 0]
        self._call(
            heads,
            query[tail.tokens],
            key_cache,
            value_cache,
            out=output[tail.tokens],
            cu_seqlens_q=tail.query_start_loc,
            max_seqlen_q=tail.max_query_len,
            seqused_k=seq_lens[tail.reqs],
            max_seqlen_k=tail.max_num_keys,
            causal=True,
            window_size=window,
            block_table=block_table[tail.reqs],
            s_aux=sinks,
        )

    def _call(
        self,
        heads: Heads,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        **arguments: Any,
    ) -> Any:
        return self._attend(
            q=query,
            # A single KV head may have any stride, but FlashAttention 3 looks at it.
            k=canonicalize_singleton_dim_strides(key_cache.transpose(1, 2)),
            v=canonicalize_singleton_dim_strides(value_cache.transpose(1, 2)),
            softmax_scale=heads.scale,
            softcap=heads.soft_cap or 0.0,
            fa_version=self._version_for(heads),
            **arguments,
        )

    def _agrees(self, heads: Heads) -> bool:
        kept = self.tail
        try:
            return all(
                self._agrees_on(trial, heads)
                for trial in trials(heads, self._dtype, self._block_size, self._device)
            )
        # What a build without this combination raises, in Python or in C++.
        except (RuntimeError, TypeError, AssertionError) as error:
            logger.warning("FlashAttention does not take %s: %s", heads, error)
            return False
        finally:
            self.tail = kept

    def _agrees_on(self, trial: Trial, heads: Heads) -> bool:
        def attend_tail(output: torch.Tensor, **batch: Any) -> None:
            rows = batch["query"], batch["key_cache"], batch["value_cache"], output
            requests = batch["seq_lens"], batch["block_table"]
            self.attend_tail(heads, *rows, *requests, batch["sinks"])

        self.tail = trial.tail
        return trial.agrees(attend_tail)


def find_flash_attention(
    vllm_config: VllmConfig, device: torch.device
) -> FlashAttention | None:
    """vLLM's own, on NVIDIA GPUs and for half precision; it takes nothing else."""
    dtype: torch.dtype = vllm_config.model_config.dtype
    if device.type != "cuda" or dtype.itemsize != 2 or torch.version.hip is not None:
        return None
    return vllm_flash_attention(
        dtype=dtype,
        block_size=vllm_config.cache_config.block_size,
        device=device,
    )


def vllm_flash_attention(*, device: torch.device, **sizes: Any) -> FlashAttention:
    """That of vLLM's wheel, in the version that vLLM takes for each kind of layer."""
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
        device=device,
        **sizes,
    )
