"""Attend and commit at vLLM's model-state hooks; requests come and go here too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_treespec.config import ConfigError
from vllm_treespec.core.attend import attach
from vllm_treespec.core.commit import commit_paths
from vllm_treespec.integration.fallback import has_custom_processors
from vllm_treespec.integration.metrics import COMMIT
from vllm_treespec.integration.namespaces import NAMESPACE, SHARED
from vllm_treespec.integration.path_options import follow_paths
from vllm_treespec.integration.rejection_sampler import TreeRejectionSampler
from vllm_treespec.kernels.compact_kv import KVLayers

if TYPE_CHECKING:
    from vllm_treespec.integration.speculator import TreeSpeculator


class TreeModelState(DefaultModelState):
    """vLLM's default state of a decoder, with trees.

    vLLM constructs it from the class alone, so the speculator is a class attribute of
    the subclass that ``bound_to`` makes.
    """

    speculator: TreeSpeculator
    _layers: KVLayers | None = None
    _num_draft_tokens = 0

    @classmethod
    def bound_to(cls, speculator: TreeSpeculator) -> type[TreeModelState]:
        return type("BoundTreeModelState", (cls,), {"speculator": speculator})

    def release_cache(self) -> None:
        """Let go of the KV cache; there will be another."""
        self._layers = None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.speculator.add_request(
            req_index,
            new_req_data.req_id,
            new_req_data.prefill_token_ids,
            new_req_data.sampling_params,
            vars(new_req_data).get(NAMESPACE, SHARED),
            new_req_data.num_computed_tokens,
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.speculator.remove_request(req_id)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        forward_context = self.vllm_config.compilation_config.static_forward_context
        drafts = self.speculator.draft_attn_layer_names
        caches, tables = [], []
        for group, table, block_size in zip(
            kv_cache_config.kv_cache_groups,
            block_tables.block_tables,
            block_tables.block_sizes,
            strict=True,
        ):
            for name in group.layer_names:
                if name in drafts:
                    continue  # its accepted tokens are fed again instead
                cache = forward_context[name].kv_cache
                if cache.shape[2] != block_size:
                    raise ConfigError(
                        f"layer {name}: the kernel's blocks hold {cache.shape[2]} "
                        f"tokens, the block table's {block_size}; set --block-size "
                        f"to {cache.shape[2]}"
                    )
                caches.append(cache)
                tables.append(table.gpu)
        self._layers = KVLayers.describe(caches, tables)

    def preprocess_state(self, input_batch: Any, *args: Any) -> None:
        # The last thing before adapters are mapped to the batch.
        super().preprocess_state(input_batch, *args)
        self.speculator.adapters.num_logits = np.diff(input_batch.cu_num_logits_np)

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        *args: Any,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> Any:
        # vLLM has computed KV slots from the positions by now, so they may change.
        speculator, num_reqs = self.speculator, input_batch.num_reqs
        attach(
            speculator.kernels,
            speculator.trees,
            speculator.batch,
            input_batch.idx_mapping[:num_reqs],
            input_batch.cu_num_logits[: num_reqs + 1],
            input_batch.query_start_loc,
            input_batch.positions,
        )
        self._num_draft_tokens = input_batch.num_draft_tokens
        speculator.has_work(continues=self._num_draft_tokens > 0)
        if speculator.flash is not None:
            is_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
            speculator.flash.begin(input_batch, is_graph=is_graph)
        return super().prepare_attn(
            input_batch, cudagraph_mode, *args, for_capture=for_capture, **kwargs
        )

    def custom_sampler(self, sampler: Any) -> tuple[Any, TreeRejectionSampler]:
        self.speculator.has_custom_processors = has_custom_processors(sampler)
        follow_paths(sampler, self.speculator.kernels, self.speculator.trees)
        return sampler, TreeRejectionSampler(sampler, self.speculator)

    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None:
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)
        if self._num_draft_tokens == 0:
            return  # nothing was verified, and the paths are those of an older step
        assert self._layers is not None, "there is a cache before there are steps"
        speculator = self.speculator
        with speculator.phases.measure(COMMIT):
            commit_paths(
                speculator.kernels,
                self._layers,
                speculator.batch,
                speculator.paths,
                idx_mapping,
            )
