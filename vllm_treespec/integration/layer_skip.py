"""Self-speculation: the target drafts for itself, with some of its sub-layers skipped.

It has no weights and no KV cache of its own (Draft & Verify, arXiv:2309.08168). The
layers that it keeps read the target's verified KV and write behind it: the newest
token's place is the first one, and the target has not been there yet. When it gets
there, verification overwrites what the draft left. Tokens that the target has computed
are never fed again, or a draft that skips a layer below one that it keeps would
replace their KV by its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform

from vllm_treespec.config import LayerSkipConfig, SkipSet
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.propose.early_stop import EarlyStop
from vllm_treespec.integration.device_draft import DeviceDraft
from vllm_treespec.integration.skipped_layers import (
    check_skip_set,
    default_skip_set,
    fingerprint,
    layers_of,
    skipping,
    with_fused_kernels,
)
from vllm_treespec.integration.stopwatch import Stopwatch


class LayerSkip(DeviceDraft):
    """Grows trees with the target's own layers."""

    config: LayerSkipConfig

    def __init__(
        self,
        config: LayerSkipConfig,
        vllm_config: VllmConfig,
        *,
        device: torch.device,
        **options: Any,
    ) -> None:
        self._clock: Stopwatch | None = None  # times the model's parts
        super().__init__(
            config,
            vllm_config,
            vllm_config.model_config,
            max_accepted=0,  # the target has computed the others
            device=device,
            stop=EarlyStop(device) if config.early_stop else None,
            **options,
        )

    def load(self, kernels: KernelSet, target: torch.nn.Module) -> None:
        self._target = target
        num_layers = len(layers_of(target)[1])
        self._use(self.config.skip or default_skip_set(num_layers))

    def set_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        self._cache = kv_cache_config, block_tables
        super().set_cache(kv_cache_config, block_tables)

    def describe(self) -> dict[str, Any]:
        """What a set of the target has to fit."""
        num_layers = len(layers_of(self._target)[1])
        return {"num_layers": num_layers, "fingerprint": fingerprint(self._target)}

    def change(
        self, attention: Sequence[int], mlp: Sequence[int], timed: bool = False
    ) -> None:
        """Skip these layers' parts from now on; graphs must not have been captured.

        Args:
            timed: measure what the parts take, see ``part_seconds``.
        """
        num_layers = len(layers_of(self._target)[1])
        self._clock = Stopwatch(2 * num_layers + 1, self._device) if timed else None
        self._use(SkipSet(attention=tuple(attention), mlp=tuple(mlp)))
        self.set_cache(*self._cache)

    def part_seconds(self) -> tuple[list[float], list[float], float]:
        """Time in each layer's attention, in each one's feed-forward part, and in the
        rest of the model, since ``change`` asked for it."""
        assert self._clock is not None, "change(timed=True) starts the clock"
        if self._device.type != "cpu":
            torch.cuda.synchronize(self._device)
        (*parts, whole), _ = self._clock.read()
        half = len(parts) // 2
        return parts[:half], parts[half:], whole - sum(parts)

    def _use(self, skip: SkipSet) -> None:
        check_skip_set(skip, self._target)
        model, self.layer_names = skipping(self._target, skip, self._clock)
        with set_current_vllm_config(self._vllm_config):
            self.model = with_fused_kernels(model)
            self._priority = _uncompiled_priority(self._vllm_config)

    def _run(self, *arguments: Any) -> torch.Tensor:
        with self._priority.set_priority():
            if self._clock is None:
                return super()._run(*arguments)
            with self._clock.measure(-1):
                return super()._run(*arguments)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._clock is None:
            return super()._logits(hidden)
        with self._clock.measure(-1):
            return super()._logits(hidden)

    def catch_up(
        self, batch: Any, num_sampled: torch.Tensor, temperatures: torch.Tensor
    ) -> None:
        num_reqs = batch.num_reqs
        slots, active = batch.idx_mapping[:num_reqs], num_sampled > 0
        ends = self._req_states.total_len.gpu[slots]
        # A request in its prefill is fed nothing: its newest token is the prompt's.
        self._set_rows(slots, ends - active.int(), ends, active, temperatures)
        self._feed_decodes[1](num_reqs)


def _uncompiled_priority(vllm_config: VllmConfig) -> Any:
    """Whose kernels vLLM prefers where it compiles nothing."""
    compilation = copy.copy(vllm_config.compilation_config)
    compilation.mode = CompilationMode.NONE
    uncompiled = copy.copy(vllm_config)
    uncompiled.compilation_config = compilation
    return current_platform.get_default_ir_op_priority(uncompiled)
