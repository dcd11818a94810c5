"""A draft model in the worker: its weights, its KV cache beside the target's, its trees.

The draft's cache is kept exact for every position that the target has computed: each
step first feeds it the tokens accepted since the last one.
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
            fed_width=max_accepted + 2,
            **options,
        )
        self.prefix = prefix
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

    def catch_up(
        self, batch: Any, num_sampled: torch.Tensor, temperatures: torch.Tensor
    ) -> None:
        num_reqs = batch.num_reqs
        lengths = np.diff(batch.query_start_loc_np[: num_reqs + 1])
        num_drafts = np.diff(batch.cu_num_logits_np[: num_reqs + 1]) - 1
        fed = lengths - num_drafts + np.minimum(num_drafts, self.max_accepted) + 1
        slots = batch.idx_mapping[:num_reqs]
        computed = torch.from_numpy(lengths.astype(np.int32))
        if self._device.type != "cpu":
            computed = computed.pin_memory().to(self._device, non_blocking=True)
        self._set_rows(
            slots,
            batch.seq_lens[:num_reqs] - computed,
            self._req_states.total_len.gpu[slots],
            num_sampled > 0,
            temperatures,
        )
        if fed.max() <= self._even_width and num_reqs <= self._max_num_even_reqs:
            self._feed_decodes(num_reqs)
        else:
            self._feed(num_reqs, fed)

    def _feed(self, num_reqs: int, fed: np.ndarray) -> None:
        """Rows as the batch has them, some requests being in their prefill."""
        cu_fed = np.zeros(num_reqs + 1, np.int32)
        np.cumsum(fed, out=cu_fed[1:])
        starts = torch.from_numpy(cu_fed)
        if self._device.type != "cpu":
            starts = starts.pin_memory().to(self._device, non_blocking=True)
        rows = torch.arange(num_reqs, device=self._device).repeat_interleave(
            starts.diff(), output_size=int(cu_fed[-1])
        )
        self._feed_rows(num_reqs, rows, starts, int(fed.max()))


def _attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    layers: dict[str, Any] = get_layers_from_vllm_config(
        vllm_config, AttentionLayerBase
    )
    return layers
