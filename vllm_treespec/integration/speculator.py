"""Propose and build where vLLM asks its speculator for draft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_treespec.config import ConfigError
from vllm_treespec.core.attend import BatchTrees
from vllm_treespec.core.build import TreeBuilder
from vllm_treespec.core.history import TokenHistory
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.propose import DecodeStep
from vllm_treespec.core.propose.factory import make_proposers
from vllm_treespec.core.propose.pool import ProposerPool
from vllm_treespec.core.schedule import num_useful_drafts
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths
from vllm_treespec.integration.attention import TreeForward
from vllm_treespec.integration.engine_args import from_vllm_config
from vllm_treespec.integration.fallback import chain_reason
from vllm_treespec.integration.model_state import TreeModelState


class TreeSpeculator(DraftModelSpeculator):
    """Owns the trees of one worker.

    It is a ``DraftModelSpeculator`` only because vLLM's model runner calls
    ``load_model`` and ``set_attn`` on nothing else; its constructor, which sizes
    buffers for a draft model, is not run.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: Any
    ) -> None:
        config = from_vllm_config(vllm_config)
        self.vllm_config = vllm_config
        self.device = device
        self.req_states = req_states
        self._set_what_the_runner_reads()
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.num_speculative_steps = config.num_speculative_tokens
        max_num_nodes = config.num_speculative_tokens + 1

        self.kernels = choose_kernels(config, device)
        self.trees = TreeBuffers.allocate(max_num_reqs, max_num_nodes, device)
        self.batch = BatchTrees.allocate(max_num_reqs, max_num_nodes, device)
        self.paths = AcceptedPaths.allocate(max_num_reqs, max_num_nodes, device)
        vocab_size = vllm_config.model_config.get_vocab_size()
        # One rank drafts for all: ranks whose trees differ would verify garbage.
        self._ranks = get_tp_group()
        self.pool = ProposerPool(
            make_proposers(config, max_num_reqs=max_num_reqs)
            if self._ranks.is_first_rank
            else [],
            max_candidates=config.num_speculative_tokens,
            vocab_size=vocab_size,
        )
        self.builder = TreeBuilder(
            self.kernels,
            self.trees,
            num_proposers=len(config.proposers),
            max_candidates=config.num_speculative_tokens,
        )
        self.history = TokenHistory.allocate(
            max_num_reqs, vllm_config.model_config.max_model_len
        )
        self.has_custom_processors = False  # until the sampler is made
        self._chain_only = np.zeros(max_num_reqs, dtype=np.bool_)
        self._slots: dict[str, int] = {}
        self._num_drafts = np.zeros(max_num_reqs, dtype=np.int32)

    def _set_what_the_runner_reads(self) -> None:
        self.model = None
        self.draft_logits = None
        self.supports_mm_inputs = False
        self.enable_adaptive_verification = False
        self.draft_attn_layer_names: set[str] = set()
        self.dcp_size = 1
        self.pcp_manager = None
        self.attn_groups: list[Any] = []

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        raise NotImplementedError("model-free proposers load no draft model")

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Bind the target's attention layers and its model state to the trees."""
        state_class = resolve_model_state_cls(self.vllm_config, target_model)
        if state_class is not DefaultModelState:
            raise ConfigError(
                f"{type(target_model).__name__} needs vLLM's {state_class.__name__}, "
                "which keeps state that trees do not cover"
            )
        layers = get_layers_from_vllm_config(
            self.vllm_config,
            AttentionLayerBase,
        )
        for name, layer in layers.items():
            # Subclasses chunk, cross or sink: their metadata describe no tree.
            if type(layer) is not Attention or not isinstance(layer.impl, TreeForward):
                raise ConfigError(
                    f"layer {name} is a {type(layer).__name__}, "
                    "which does not know trees"
                )
            layer.impl.bind(self.kernels, self.batch, layer.sliding_window)
        target_model.get_model_state_cls = lambda: TreeModelState.bound_to(self)  # type: ignore[assignment]

    def set_attn(self, *args: Any) -> None:
        """No draft layers, so no draft attention metadata."""

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Drafting runs on the host, outside CUDA graphs."""

    def capture(self) -> None:
        """See ``init_cudagraph_manager``."""

    def observe_verification(self, *args: Any) -> None:
        """vLLM's acceptance estimator serves adaptive verification, which is off."""

    def add_request(
        self, slot: int, req_id: str, token_ids: Sequence[int], sampling_params: Any
    ) -> None:
        self._slots[req_id] = slot
        self.trees.reset(slot)
        reason = chain_reason(sampling_params, self.has_custom_processors)
        self._chain_only[slot] = reason is not None
        self.pool.settle()
        self.pool.add_request(slot)
        self.history.start(slot, token_ids)

    def remove_request(self, req_id: str) -> None:
        slot = self._slots.pop(req_id, None)
        if slot is not None:
            self.pool.remove_request(slot)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,  # [num_reqs] int32
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        num_reqs = input_batch.num_reqs
        num_nodes = self.num_speculative_steps
        if dummy_run:
            if is_profile:
                self._show_logits_to_profiler()
            return torch.zeros(
                num_reqs, num_nodes, dtype=torch.int64, device=self.device
            )
        slots_np = input_batch.idx_mapping_np.astype(np.int32)
        counts = self._append_sampled(input_batch.idx_mapping, slots_np, num_sampled)
        step = DecodeStep(slots_np, self.history.token_ids, self.history.num_tokens)
        if num_speculative_tokens is None:
            num_speculative_tokens = num_nodes
        # A request still in its prefill has no newest token to continue.
        budgets = np.where(counts > 0, num_speculative_tokens, 0).astype(np.int32)
        candidates = self.pool.propose(step)
        if self._ranks.world_size > 1:
            candidates = self._ranks.broadcast_object(candidates, src=0)
        self._num_drafts[slots_np] = num_useful_drafts(candidates, budgets)
        draft_tokens = self.builder.build(
            candidates, input_batch.idx_mapping, budgets, self._chain_only[slots_np]
        )
        self.pool.learn(step)
        return draft_tokens

    def num_drafts(self, req_id: str) -> int:
        """Draft tokens of the request that are worth scheduling."""
        slot = self._slots.get(req_id)
        return 0 if slot is None else int(self._num_drafts[slot])

    def _append_sampled(
        self,
        slots: torch.Tensor,  # [num_reqs] int64
        slots_np: npt.NDArray[np.int32],
        num_sampled: torch.Tensor,  # [num_reqs] int32
    ) -> npt.NDArray[np.int32]:
        """Bring the history up to date; returns tokens sampled per row.

        Model-free drafting happens on the host, so this waits for the device once.
        """
        states = self.req_states
        token_ids = states.all_token_ids.gpu
        columns = torch.arange(self.num_speculative_steps + 1, device=self.device)
        first = states.total_len.gpu[slots] - num_sampled
        columns = (first[:, None] + columns).clamp_(max=token_ids.shape[1] - 1)
        newest = token_ids[slots[:, None], columns]
        host = torch.cat([num_sampled[:, None], newest], dim=1).cpu().numpy()
        counts, sampled = host[:, 0], host[:, 1:]
        self.pool.settle()
        self.history.append(slots_np, sampled, counts)
        return counts

    def _show_logits_to_profiler(self) -> None:
        """Claim what verification will, so that the KV cache leaves room for it."""
        rows = self.trees.parents.numel()
        vocab_size = self.vllm_config.model_config.get_vocab_size()
        dtype = self.vllm_config.model_config.dtype
        torch.empty(rows, vocab_size, dtype=dtype, device=self.device)

    def describe_trees(self) -> dict[str, dict[str, Any]]:
        """The tree waiting for verification of every request, for people to look at."""
        trees = {}
        for req_id, slot in self._slots.items():
            count = int(self.trees.num_nodes[slot])
            bits = self.trees.proposers[slot, :count].tolist()
            trees[req_id] = {
                "token_ids": self.trees.token_ids[slot, :count].tolist(),
                "parents": self.trees.parents[slot, :count].tolist(),
                "proposers": [
                    [
                        name
                        for index, name in enumerate(self.pool.names)
                        if bit >> index & 1
                    ]
                    for bit in bits
                ],
            }
        return trees
