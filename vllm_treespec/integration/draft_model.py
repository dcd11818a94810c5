"""A draft model in the worker: its weights, its KV cache beside the target's, its trees.

Before it drafts, the draft is fed the tokens that its cache lacks: those of the last
step, or all since it last drafted.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import AuxOutputConfig, VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload.inplace import reload_weights

from vllm_treespec.config import ConfigError, DraftModelConfig
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.transfer import pinned
from vllm_treespec.integration.attention import bind_layer
from vllm_treespec.integration.device_draft import DeviceDraft
from vllm_treespec.integration.draft_config import draft_model_config


class DraftModel(DeviceDraft):
    """Grows trees with a small model of its own weights and KV cache."""

    config: DraftModelConfig

    def __init__(
        self,
        config: DraftModelConfig,
        vllm_config: VllmConfig,
        *,
        max_accepted: int,
        prefix: str,
        **options: Any,
    ) -> None:
        """
        Args:
            max_accepted: nodes that a step can accept at most, hence one less than
                the tokens that a decoding request catches up with.
            prefix: of the names of the model's layers, unlike any other model's.
        """
        super().__init__(
            config,
            vllm_config,
            draft_model_config(config, vllm_config.model_config),
            max_accepted=max_accepted,
            **options,
        )
        self.prefix = prefix
        # Tokens of each slot's text in the draft's cache, and how many it lacks at most.
        self._num_fed = torch.zeros_like(self._ends)
        self._num_lacking = np.zeros(self._max_num_reqs, np.int64)
        self._has_rested = False  # blocks of the cache may have been left out
        self.max_accepted = max_accepted

    def load(self, kernels: KernelSet, target: torch.nn.Module) -> None:
        """Load the weights and bind the attention layers to the draft's trees."""
        vllm_config = self._vllm_config
        before = set(_attention_layers(vllm_config))
        # vLLM validates the copy anew, which writes into these parts of it. What the
        # engine does for its users is the target's business, and may not fit a draft.
        self._load_config = config = replace(
            vllm_config,
            model_config=self._model_config,
            quant_config=None,
            parallel_config=copy.copy(vllm_config.parallel_config),
            scheduler_config=copy.copy(vllm_config.scheduler_config),
            aux_output_config=AuxOutputConfig(),
            engram_config=None,
            lora_config=None,
            kv_events_config=None,
            ec_transfer_config=None,
            weight_transfer_config=None,
            reasoning_config=None,
        )
        try:
            with set_model_tag(self.prefix):
                self.model = get_model(vllm_config=config, prefix=self.prefix)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"draft_model {self.config.model!r} does not fit beside the target: "
                f"{error}; take a smaller or quantized draft, or more GPUs"
            ) from error
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"draft_model {self.config.model!r}: {error}") from error
        layers = _attention_layers(vllm_config)
        self.layer_names = set(layers) - before
        self.own_layer_names = frozenset(self.layer_names)
        for name in self.layer_names:
            layers[name].is_draft_layer = True
            bind_layer(name, layers[name], kernels, self.grower.batch)

    def reload(self) -> None:
        """Load the weights again, in place: something has discarded them."""
        reload_weights(self._load_config, self.model, None, None, True)

    def add_request(self, slot: int, num_computed: int) -> None:
        # Cached blocks have the draft's keys as well, unless it rested when they came.
        num_fed = 0 if self._has_rested else num_computed
        self._num_fed[slot].fill_(num_fed)
        self._num_lacking[slot] = num_computed - num_fed

    def pass_by(self, batch: Any) -> None:
        slots, num_reqs = batch.idx_mapping_np, batch.num_reqs
        lengths = np.diff(batch.query_start_loc_np[: num_reqs + 1])
        num_drafts = np.diff(batch.cu_num_logits_np[: num_reqs + 1]) - 1
        num_accepted = np.minimum(num_drafts, self.max_accepted)
        # A prefill's last part is followed by a token as well.
        prefilled = np.where(batch.is_prefilling_np[:num_reqs], lengths, 0)
        self._num_lacking[slots] += prefilled + num_accepted + 1

    def rest(self) -> None:
        self._has_rested = True

    def catch_up(
        self, batch: Any, num_sampled: torch.Tensor, temperatures: torch.Tensor
    ) -> None:
        num_reqs, slots = batch.num_reqs, batch.idx_mapping[: batch.num_reqs]
        # In its prefill, a request has been computed to the end of the step's tokens.
        ends = torch.where(
            num_sampled > 0,
            self._req_states.total_len.gpu[slots],
            batch.seq_lens[:num_reqs],
        )
        starts = self._num_fed[slots]
        self._set_rows(slots, starts, ends, num_sampled > 0, temperatures)
        num_fed = self._feed(batch, self._lacking(batch))
        fits = starts + num_fed <= self._table_len
        self._num_fed[slots] = torch.where(
            fits, torch.minimum(starts + num_fed, ends), starts
        ).int()

    def _lacking(self, batch: Any) -> np.ndarray:
        """``[num_reqs]`` tokens to feed. Who is so near to a block table's end that
        rows of padding would not fit is not drafted for any more."""
        ends = batch.seq_lens_cpu_upper_bound.numpy()[: batch.num_reqs]
        is_near = ends + max(self._feed_decodes) >= self._table_len
        lacking: np.ndarray = self._num_lacking[batch.idx_mapping_np]
        return np.where(is_near, 0, lacking)

    def _feed(self, batch: Any, lacking: np.ndarray) -> Any:
        """Feed the requests, and return how many rows each of them had: ``[num_reqs]``
        int32, or the same number for all."""
        num_reqs, slots = batch.num_reqs, batch.idx_mapping_np
        for width, graphs in sorted(self._feed_decodes.items()):
            if lacking.max() <= width and num_reqs * width <= self._max_num_tokens:
                graphs(num_reqs)
                self._num_lacking[slots] -= lacking
                return width
        # As many as the largest batch has; the others wait for the next step.
        before = np.cumsum(lacking) - lacking
        fed = np.clip(self._max_num_tokens - before, 0, lacking)
        self._num_lacking[slots] -= fed
        return self._feed_unevenly(num_reqs, fed)

    def _feed_unevenly(self, num_reqs: int, fed: np.ndarray) -> torch.Tensor:
        cu_fed = np.zeros(num_reqs + 1, np.int32)
        np.cumsum(fed, out=cu_fed[1:])
        starts = pinned(cu_fed, self._device).to(self._device, non_blocking=True)
        rows = torch.arange(num_reqs, device=self._device).repeat_interleave(
            starts.diff(), output_size=int(cu_fed[-1])
        )
        self._feed_rows(num_reqs, rows, starts, int(fed.max()))
        return starts.diff()


def _attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    layers: dict[str, Any] = get_layers_from_vllm_config(
        vllm_config, AttentionLayerBase
    )
    return layers
