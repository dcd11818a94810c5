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
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_treespec.core.attend import CausalTail, causal_tail
from vllm_treespec.integration.flash_trial import SEQ_LENS, Heads, Trial, trials
from vllm_treespec.kernels.attention_plan import Region, regions
from vllm_treespec.kernels.reference.tree_attention import tree_attention as twin

logger = logging.getLogger(f"vllm.{__name__}")

VERSIONS = (2, 3)


class FlashAttention:
    """FlashAttention over a paged KV cache, for parts of a step's work."""

    tail: CausalTail | None = None  # requests of this step without trees

    def __init__(
        self,
        attend: Callable[..., Any],  # vLLM's flash_attn_varlen_func
        version_for: Callable[[Heads], int | None],
        regions_for: Callable[[int], list[Region]],  # by head size
        *,
        dtype: torch.dtype,
        block_size: int,
        max_num_reqs: int,
        max_num_keys: int,  # of a request
        device: torch.device,
    ) -> None:
        self._attend = attend
        self._version_for = functools.cache(version_for)
        self._regions_for = regions_for
        self._dtype = dtype
        self._block_size = block_size
        self._max_num_keys = max_num_keys
        self._device = device
        # Keys of earlier steps, at an address that CUDA graphs can keep.
        self._num_context = torch.zeros(
            max(max_num_reqs, len(SEQ_LENS)), dtype=torch.int32, device=device
        )
        self._num_known_keys = 0  # that the longest request is known to have at most
        self._takes_contexts = False  # of some layers, sometimes
        self._verdicts: dict[Heads, bool] = {}

    def begin(self, input_batch: Any, *, is_graph: bool) -> None:
        """Say what this step's forward is for.

        Args:
            input_batch: vLLM's ``InputBatch``.
            is_graph: whether it is captured or replayed, for batches of which the host
                decides nothing.
        """
        num_reqs, query_start_loc = input_batch.num_reqs, input_batch.query_start_loc
        max_num_keys = input_batch.seq_lens_cpu_upper_bound.numpy()
        self.tail, self._num_known_keys = None, 0
        if not is_graph:
            self._num_known_keys = int(max_num_keys[:num_reqs].max(initial=0))
            self.tail = causal_tail(
                input_batch.cu_num_logits_np[: num_reqs + 1],
                input_batch.query_start_loc_np,
                query_start_loc,
                max_num_keys,
            )
        if self._takes_contexts:
            self.count_context(input_batch.seq_lens, query_start_loc)

    def count_context(
        self,
        seq_lens: torch.Tensor,  # [num_reqs] int32
        query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    ) -> None:
        """Remember how many keys each request has of earlier steps."""
        num_context = self._num_context[: len(seq_lens)]
        torch.sub(seq_lens, query_start_loc.diff(), out=num_context)

    def serves(self, heads: Heads) -> bool:
        """Whether it gives such a layer what our kernel gives."""
        if heads not in self._verdicts:
            verdict = self._version_for(heads) in VERSIONS and self._agrees(heads)
            self._verdicts[heads] = verdict
            self._takes_contexts |= verdict and self._may_take_context(heads)
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

    def takes_context(self, heads: Heads, max_query_len: int) -> bool:
        """Whether ``around`` is the faster way for the requests with trees."""
        rows = max_query_len * (heads.num_heads // heads.num_kv_heads)
        return self._may_take_context(heads) and any(
            region.has(rows, self._num_known_keys)
            for region in self._regions_for(heads.head_size)
        )

    def _may_take_context(self, heads: Heads) -> bool:
        # A sliding window is one of depths, not of slots.
        return heads.sliding_window is None and bool(self._regions_for(heads.head_size))

    def around(self, heads: Heads, tree_attention: Callable[..., None]) -> Any:
        """``tree_attention`` in three launches: FlashAttention over the keys of earlier
        steps, the kernel over this step's, and a merge by their log-sum-exp."""

        def attend(
            query: torch.Tensor,
            key_cache: torch.Tensor,
            value_cache: torch.Tensor,
            output: torch.Tensor,
            query_start_loc: torch.Tensor,
            seq_lens: torch.Tensor,
            block_table: torch.Tensor,
            num_nodes: torch.Tensor,
            depths: torch.Tensor,
            masks: torch.Tensor,
            *,
            max_query_len: int,
            **options: Any,
        ) -> None:
            num_context = self._num_context[: len(seq_lens)]
            context_output, context_log_sums = self._call(
                heads,
                query,
                key_cache,
                value_cache,
                out=None,
                cu_seqlens_q=query_start_loc,
                max_seqlen_q=max_query_len,
                seqused_k=num_context,
                max_seqlen_k=self._num_known_keys or self._max_num_keys,
                causal=False,
                window_size=[-1, -1],
                block_table=block_table,
                return_softmax_lse=True,
                s_aux=None,  # our kernel counts sinks, once
            )
            tree_output = torch.empty_like(context_output)
            log_sums = context_log_sums.new_empty(query.shape[1::-1])
            tree_attention(
                query,
                key_cache,
                value_cache,
                tree_output,
                query_start_loc,
                seq_lens,
                block_table,
                num_nodes,
                depths,
                masks,
                max_query_len=max_query_len,
                first_keys=num_context,
                log_sums=log_sums.t(),
                **options | {"split": None},
            )
            merge_attn_states(
                output, context_output, context_log_sums, tree_output, log_sums
            )

        return attend

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
        kept = self.tail, self._num_known_keys
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
            self.tail, self._num_known_keys = kept

    def _agrees_on(self, trial: Trial, heads: Heads) -> bool:
        def attend_tail(output: torch.Tensor, **batch: Any) -> None:
            rows = batch["query"], batch["key_cache"], batch["value_cache"], output
            requests = batch["seq_lens"], batch["block_table"]
            self.attend_tail(heads, *rows, *requests, batch["sinks"])

        self.tail, self._num_known_keys = trial.tail, trial.tail.max_num_keys
        if not trial.agrees(attend_tail, has_trees=False):
            return False
        if not self._may_take_context(heads):
            return True
        self.count_context(
            trial.arguments["seq_lens"], trial.arguments["query_start_loc"]
        )
        return trial.agrees(self.around(heads, twin), has_trees=True)


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
        max_num_reqs=vllm_config.scheduler_config.max_num_seqs,
        max_num_keys=vllm_config.model_config.max_model_len,
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
        partial(regions, device),
        device=device,
        **sizes,
    )
