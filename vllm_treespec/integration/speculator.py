"""Propose and build where vLLM asks its speculator for draft tokens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import graph_capture
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_treespec.config import (
    ConfigError,
)
from vllm_treespec.core.attend import BatchTrees
from vllm_treespec.core.build import TreeBuilder
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.observe import StepCounts
from vllm_treespec.core.propose.factory import make_proposers
from vllm_treespec.core.schedule import RequestLimits, drop_unwanted
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths
from vllm_treespec.integration.attention import bind_layer
from vllm_treespec.integration.device_drafts import DeviceDrafts
from vllm_treespec.integration.engine_args import from_vllm_config
from vllm_treespec.integration.fallback import chain_reason, count_fallback
from vllm_treespec.integration.flash_attention import find_flash_attention
from vllm_treespec.integration.host_drafts import HostDrafts
from vllm_treespec.integration.metrics import (
    BUILD,
    BUSY,
    FALLBACK_REASONS,
    NOT_SCHEDULED,
    NOT_WANTED,
    NOTHING_OFFERED,
    PHASES,
    RESTING,
    Increments,
)
from vllm_treespec.integration.model_state import TreeModelState
from vllm_treespec.integration.namespaces import SHARED
from vllm_treespec.integration.node_rows import NodeAdapters, VerifiedRows
from vllm_treespec.integration.reports import PendingReport, Reporter
from vllm_treespec.integration.sampled_drafts import SampledDrafts
from vllm_treespec.integration.sizing import max_num_rows, num_warm_up_rows
from vllm_treespec.integration.stopwatch import Stopwatch
from vllm_treespec.integration.worth import Worth

logger = logging.getLogger(f"vllm.{__name__}")


class TreeSpeculator(DraftModelSpeculator):
    """Owns the trees of one worker.

    It is a ``DraftModelSpeculator`` only because vLLM's model runner calls
    ``load_model`` and ``set_attn`` on nothing else; its constructor, which sizes
    buffers for a draft model, is not run.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        req_states: Any,
        choose_graphs: Callable[[], None],
    ) -> None:
        config = from_vllm_config(vllm_config)
        self._choose_graphs = choose_graphs  # of the target's decode steps
        self._config = config
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
        self.flash = find_flash_attention(vllm_config, device)
        self.paths = AcceptedPaths.allocate(max_num_reqs, max_num_nodes, device)
        self.builder = TreeBuilder(
            self.kernels,
            self.trees,
            num_proposers=len(config.proposers),
            max_candidates=config.max_candidates,
        )
        # One rank drafts on the host for all: ranks whose trees differ would verify
        # garbage. Draft models run on every rank, as vLLM's own do.
        self._ranks = get_tp_group()
        self.hosted: HostDrafts | None = None
        if config.hosted_proposers:
            self.hosted = HostDrafts(
                make_proposers(config, max_num_reqs=max_num_reqs)
                if self._ranks.is_first_rank
                else [],
                config,
                vllm_config,
                kernels=self.kernels,
                ranks=self._ranks,
                req_states=req_states,
            )
        self._worth = Worth(
            len(config.proposers),
            max_num_reqs,
            adaptive=config.adaptive,
            ranks=self._ranks,
            device=device,
        )
        self.drafts = DeviceDrafts(
            config,
            vllm_config,
            kernels=self.kernels,
            builder=self.builder,
            worth=self._worth,
            ranks=self._ranks,
            req_states=req_states,
            device=device,
        )
        self.sampled: SampledDrafts | None = None
        if config.num_drawn:
            first = self.drafts.models[0]
            self.sampled = SampledDrafts(
                config,
                vllm_config,
                self.kernels,
                max_num_rows=first.grower.max_num_nodes,
                dtype=first.dtype,
                device=device,
            )
            first.drawing = self.sampled.drawing
        self._names = config.proposer_names
        self._limits = RequestLimits(max_num_reqs, len(config.proposers), device)
        self.phases = Stopwatch(len(PHASES), device)
        self._reporter = Reporter()
        self.adapters = NodeAdapters(max_num_reqs)  # of the requests, by row of logits
        self._counts: StepCounts | None = None  # of the last step that verified drafts
        # [max_num_reqs], why a slot would have no drafts verified
        self._no_draft_reasons = np.full(max_num_reqs, NOTHING_OFFERED, np.int8)
        self.has_custom_processors = False  # until the sampler is made
        self.fallbacks: Counter[str] = Counter()  # reason -> requests given a chain
        self._chain_only = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self._slots: dict[str, int] = {}
        # [max_num_reqs], whether all requests may draft from what a slot's says
        self._teaches = np.ones(max_num_reqs, np.bool_)
        self._taught: VerifiedRows | None = None  # by this step, if it was verified
        self._num_drafts = np.zeros(max_num_reqs, dtype=np.int32)

    def _set_what_the_runner_reads(self) -> None:
        self.model: torch.nn.Module | None = None
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
            bind_layer(name, layer, self.kernels, self.batch, self.flash)
        for draft in self.drafts.models.values():
            draft.load(self.kernels, target_model)
            self.draft_attn_layer_names |= draft.own_layer_names
        # What vLLM saves, restores and looks for under names that begin with 'draft.'.
        if own := {draft.prefix: draft.model for draft in self.drafts.with_own_weights}:
            self.model = torch.nn.ModuleDict(own)
        target_model.get_model_state_cls = lambda: TreeModelState.bound_to(self)  # type: ignore[assignment]

    def set_attn(
        self, model_state: Any, kv_cache_config: Any, block_tables: Any, *args: Any
    ) -> None:
        # The last cache was the memory profile's. Its graphs must not be replayed.
        model_state.release_cache()
        self.drafts.release_graphs()
        for draft in self.drafts.models.values():
            draft.set_cache(kv_cache_config, block_tables)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """The target's graphs are about to be captured. Draft models keep their own,
        see ``capture``."""
        self._choose_graphs()

    def capture(self) -> None:
        """vLLM has captured its graphs; now those that draft."""
        with graph_capture(device=self.device):
            self.drafts.capture()

    def observe_verification(self, *args: Any) -> None:
        """vLLM's acceptance estimator serves adaptive verification, which is off."""

    def add_request(
        self,
        slot: int,
        req_id: str,
        token_ids: Sequence[int],
        sampling_params: Any,
        namespace: int,
        num_computed: int,  # of the tokens, those in the target's cache
    ) -> None:
        """
        Args:
            namespace: of the requests that it may learn from, and that from it.
        """
        self._slots[req_id] = slot
        options = self._config.for_request(
            sampling_params.extra_args if sampling_params is not None else None
        )
        assert options.max_nodes is not None and options.proposers is not None
        assert options.remember is not None
        self._limits.set(
            slot,
            options.max_nodes,
            [
                name in options.proposers
                and (namespace == SHARED or index != self.drafts.shared_index)
                for index, name in enumerate(self._names)
            ],
        )
        self._teaches[slot] = is_public = namespace == SHARED and options.remember
        self.builder.reset(slot)
        reason = chain_reason(
            sampling_params, has_custom_processors=self.has_custom_processors
        )
        self._chain_only[slot].fill_(reason is not None)
        if reason is not None:
            count_fallback(self.fallbacks, reason)
        if self.sampled is not None:
            self.sampled.remove_request(slot)
            # A seed asks for the very tokens of another run: those of no speculation.
            may_draw = reason is None and sampling_params.seed is None
            may_draw = may_draw and bool(self._limits.allowed[0, slot])
            if may_draw and self._config.draws_at(sampling_params.temperature):
                self.sampled.add_request(slot)
        if self.hosted is not None:
            self.hosted.add_request(
                slot, token_ids, namespace, is_remembered=options.remember
            )
        self.drafts.add_request(slot, num_computed)
        if is_public:
            self.drafts.add_prompt(token_ids)

    def remove_request(self, req_id: str) -> None:
        slot = self._slots.pop(req_id, None)
        if slot is None:
            return
        if self.hosted is not None:
            self.hosted.remove_request(slot)
        if self.sampled is not None:
            self.sampled.remove_request(slot)

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
        if dummy_run:
            if is_profile:
                self._show_memory_to_profiler(input_batch.num_tokens)
            return torch.zeros(
                num_reqs,
                self.num_speculative_steps,
                dtype=torch.int64,
                device=self.device,
            )
        if num_speculative_tokens is None:
            num_speculative_tokens = self.num_speculative_steps
        slots = input_batch.idx_mapping[:num_reqs]
        slots_np = input_batch.idx_mapping_np.astype(np.int32)
        self._reporter.decoded(input_batch, self._no_draft_reasons[slots_np])
        self._learn(input_batch, slots, num_sampled)
        if self.hosted is not None:
            self.hosted.fetch_sampled(slots, slots_np, num_sampled)
        slot_list = slots_np.tolist()
        # [num_proposers, num_reqs], whose drafts who gets
        allowed = self._limits.allowed[:, slots_np]
        wanted = allowed & np.array(self._worth.drafting)[:, None]
        wanted &= num_speculative_tokens > 0
        draws = self._draws(slot_list, num_speculative_tokens)
        if self.sampled is not None and draws:
            self.sampled.prepare(slots, temperature, seeds)
        self._learn_logits(input_batch)
        offered = self.drafts.draft(
            input_batch, num_sampled, temperature, wanted, draws=draws
        )
        if self.hosted is not None:
            offered += self.hosted.draft(
                slots_np,
                wanted,
                self.builder,
                self._worth,
                num_nodes=num_speculative_tokens,
            )
        if not allowed.all():
            drop_unwanted(self.builder.candidates.num_candidates[:, :num_reqs], allowed)
        self._num_drafts[slots_np] = np.minimum(
            offered,
            np.minimum(self._limits.max_nodes_np[slots_np], num_speculative_tokens),
        )
        self._note_reasons(slots_np, allowed, offered, num_speculative_tokens)
        with self.phases.measure(BUILD):
            draft_tokens = self._build(
                slots, num_sampled, num_speculative_tokens, slot_list, draws=draws
            )
        if self._config.min_probability and not draws:  # drawn ones come unrated
            likely = self.builder.num_likely(slots, self._config.min_probability)
            self._num_drafts[slots_np] = np.minimum(
                self._num_drafts[slots_np], likely.numpy()
            )
        if not self.vllm_config.scheduler_config.async_scheduling:
            self.has_work(continues=True)  # vLLM waits for the tokens itself
        self._worth.end_step()
        if self.hosted is not None:
            self.hosted.learn(slots_np)
        return draft_tokens

    def has_work(self, *, continues: bool) -> None:
        """The device is given the next step.

        Args:
            continues: with requests of the last one, else there may have been a pause.
        """
        if self.hosted is not None:
            self.hosted.end_stall(self._worth if continues else None)

    def verified(
        self,
        input_batch: Any,
        logits: torch.Tensor,  # [num_logits, vocab_size], one row per node
        sampled: torch.Tensor,  # [num_reqs, max_num_nodes] int64
        num_sampled: torch.Tensor,  # [num_reqs] int32
        counts: StepCounts,
    ) -> None:
        """Drafts were verified; their trees are about to be replaced."""
        self._counts = counts
        if self._ranks.is_first_rank:
            self._reporter.verified(counts)
        self._taught = VerifiedRows(
            logits, input_batch, self.trees, self.paths, sampled, num_sampled
        )

    def clear(self) -> None:
        """Forget all text that proposers have learned from."""
        if self.hosted is not None:
            self.hosted.pool.clear()
        self.drafts.clear()

    def allocate_counts(self, num_reqs: int) -> StepCounts:
        return StepCounts.allocate(num_reqs, len(self._names), self.device)

    def take_report(self) -> PendingReport | None:
        """What the step came to, on the first rank."""
        totals: Increments = {
            "fallbacks": [self.fallbacks[reason] for reason in FALLBACK_REASONS],
            "draft_seconds": self._worth.stopwatch.seconds(),
            "phase_seconds": self.phases.seconds(),
        }
        gauges: Increments = {}
        faults = self.drafts.faulty
        if self.hosted is not None:
            hosted = self.hosted
            faults = faults.union(hosted.faulty)
            totals["lookups"] = hosted.lookups.tolist()
            totals["lookup_hits"] = hosted.hits.tolist()
            gauges["suffix_cached_tokens"] = [hosted.num_cached_tokens]
        totals["proposer_faults"] = [
            float(index in faults) for index in range(len(self._names))
        ]
        drafting = enumerate(self._worth.drafting)
        rests = not any(drafts and index not in faults for index, drafts in drafting)
        pending = self._reporter.take(totals, gauges, rests=rests)
        return pending if self._ranks.is_first_rank else None

    def _note_reasons(
        self,
        slots: npt.NDArray[np.int32],
        allowed: npt.NDArray[np.bool_],  # [num_proposers, num_reqs]
        offered: npt.NDArray[np.int32],  # [num_reqs], nodes
        num_nodes: int,
    ) -> None:
        """Remember why the next step of each may have no drafts."""
        idle = NOTHING_OFFERED if any(self._worth.drafting) else RESTING
        reasons = np.where(offered > 0, NOT_SCHEDULED, idle if num_nodes else BUSY)
        self._no_draft_reasons[slots] = np.where(allowed.any(0), reasons, NOT_WANTED)

    def _draws(self, slot_list: list[int], num_nodes: int) -> bool:
        """Whether a request of this batch has its children drawn."""
        return (
            self.sampled is not None
            and 0 in self.drafts.models
            and self._worth.drafting[0]
            and num_nodes > 0
            and self.sampled.any_of(slot_list)
        )

    def _build(
        self,
        slots: torch.Tensor,  # [num_reqs] int64
        num_sampled: torch.Tensor,  # [num_reqs] int32
        num_nodes: int,
        slot_list: list[int],
        *,
        draws: bool,
    ) -> torch.Tensor:
        sampled, is_drawn = self.sampled, None
        draws = draws and 0 in self.drafts.models  # it may have failed meanwhile
        if sampled is not None and draws:
            is_drawn = sampled.drawing.is_drawn[: slots.shape[0]]
        draft_tokens = self.builder.build(
            slots,
            num_sampled,
            self._limits.max_nodes,
            self._chain_only,
            num_nodes=num_nodes,
            is_drawn=is_drawn,
        )
        if sampled is None:
            return draft_tokens
        if draws:
            sampled.place(
                slots,
                self.builder.candidates.of(0),
                self.drafts.models[0].grower,
                slot_list,
            )
        else:
            sampled.reset(slots, slot_list)
        return draft_tokens

    def _learn(
        self, input_batch: Any, slots: torch.Tensor, num_sampled: torch.Tensor
    ) -> None:
        """Compare what the target said with the last trees, and with what was drafted."""
        states = self.req_states
        self._worth.stopwatch.step()
        if input_batch.num_draft_tokens and self._counts is not None:
            self._worth.observe(self._counts)
            self.drafts.learn(self.trees, self.paths, slots)
        teaches = self._teaches[input_batch.idx_mapping_np]
        if not teaches.all():
            # What voices are worth is everybody's to see.
            num_sampled = num_sampled * torch.from_numpy(teaches).to(num_sampled)
        self.builder.learn(
            slots, num_sampled, states.all_token_ids.gpu, states.total_len.gpu
        )

    def _learn_logits(self, input_batch: Any) -> None:
        """Learn from what was verified, now that the tokens are on their way out."""
        taught, self._taught = self._taught, None
        if taught is None or taught.batch is not input_batch:
            return
        teaches = self._teaches[input_batch.idx_mapping_np]
        if teaches.any():
            self.drafts.learn_logits(taught.of_requests(np.flatnonzero(teaches)))

    def num_drafts(self, req_id: str) -> int:
        """Draft tokens of the request that are worth scheduling."""
        slot = self._slots.get(req_id)
        return 0 if slot is None else int(self._num_drafts[slot])

    def parents(self, req_ids: Sequence[str]) -> dict[str, list[int]]:
        """Of the requests that have trees, every draft token's parent in node order,
        -1: the root. Waits for the device."""
        slots = {name: self._slots[name] for name in req_ids if name in self._slots}
        index = torch.tensor(list(slots.values()), dtype=torch.int64)
        index = index.to(self.device)
        trees = zip(
            slots,
            self.trees.parents[index].tolist(),
            self.trees.num_nodes[index].tolist(),
            self._chain_only[index].tolist(),
            strict=True,
        )
        return {
            name: [parent - 1 for parent in parents[1:count]]
            for name, parents, count, is_chain in trees
            if not is_chain
        }

    def _show_memory_to_profiler(self, num_tokens: int) -> None:
        """Claim what verification and drafting will, so that the KV cache leaves room."""
        self._show_logits_to_profiler()
        for draft in self.drafts.models.values():
            draft.profile(num_tokens)

    def _show_logits_to_profiler(self) -> None:
        """Claim what verification will, so that the KV cache leaves room for it."""
        rows = max(max_num_rows(self.vllm_config), num_warm_up_rows(self.vllm_config))
        vocab_size = self.vllm_config.model_config.get_vocab_size()
        dtype = self.vllm_config.model_config.dtype
        _ = (
            torch.empty(rows, vocab_size, dtype=dtype, device=self.device),
            # What is sampled from, in float32, some requests at a time.
            torch.empty(
                min(rows, get_max_chunk_logits(vocab_size)),
                vocab_size,
                device=self.device,
            ),
        )

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
                    [name for index, name in enumerate(self._names) if bit >> index & 1]
                    for bit in bits
                ],
            }
        return trees
