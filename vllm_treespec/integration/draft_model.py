"""A draft model in the worker: its weights, its KV cache beside the target's, its trees.

The draft shares the target's block tables, so its cache is kept exact for every
position that the target has computed: each step first feeds it the tokens accepted
since the last one. What it writes for a tree's nodes lies behind the newest token and
is overwritten later, so nothing has to be moved when a path is accepted.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader import get_model
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_treespec.config import ConfigError, DraftModelConfig
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.propose.draft_tree import MIN_TEMPERATURE, Frontier, TreeGrower
from vllm_treespec.core.propose.drawing import Drawing
from vllm_treespec.core.propose.factory import make_shape
from vllm_treespec.integration.attention import TreeMetadata, bind_layer
from vllm_treespec.integration.cuda_graphs import GraphedRows
from vllm_treespec.integration.draft_config import draft_model_config


class DraftModel:
    """Grows one tree per request with a small model, level by level."""

    def __init__(
        self,
        config: DraftModelConfig,
        vllm_config: VllmConfig,
        *,
        max_accepted: int,
        num_drawn: int,
        prefix: str,
        req_states: Any,
        out: DeviceCandidates,
        device: torch.device,
    ) -> None:
        """
        Args:
            max_accepted: nodes that a step can accept at most, hence one less than
                the tokens that a decoding request catches up with.
            num_drawn: nodes of a tree that it draws for sampled requests, 0 for none.
            prefix: of the names of the model's layers, unlike any other model's.
            req_states: vLLM's ``RequestState``, whose tokens the draft is fed.
            out: where ``propose`` writes.
        """
        self.config = config
        self._vllm_config = vllm_config
        self._model_config = draft_model_config(config, vllm_config.model_config)
        self._prefix = prefix
        self._req_states = req_states
        self._out = out
        self._device = device
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        num_nodes = vllm_config.num_speculative_tokens
        shape = make_shape(config, num_nodes, device, num_drawn)
        self.grower = TreeGrower(shape, max_num_reqs, device)
        self.max_accepted = max_accepted
        target_len = vllm_config.model_config.max_model_len
        self.max_len = min(self._model_config.max_model_len, target_len)
        self._table_len = target_len
        # What a decoding request can need, and how many may be padded to that.
        self._even_width = max_accepted + 2
        max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._max_num_even_reqs = max_num_tokens // self._even_width
        self.layer_names: set[str] = set()

        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(max_num_reqs, dtype=dtype, device=device)

        # This step's requests in batch order, where CUDA graphs look for them.
        self._slots = zeros(torch.int64)
        self._starts = zeros(torch.int32)  # first position that is fed
        self._ends = zeros(torch.int32)  # behind the newest token
        self._active = zeros(torch.bool)
        self._temperatures = zeros(torch.float32) + 1
        # Both may have ids that mean nothing, behind the vocabulary that they share.
        self._vocab_size = self._model_config.get_vocab_size()
        self._target_vocab_size = vllm_config.model_config.get_vocab_size()
        hidden_size = self._model_config.get_hidden_size()
        self._newest_hidden = torch.zeros(
            max_num_reqs, hidden_size, dtype=self._model_config.dtype, device=device
        )
        self._feed_decodes = GraphedRows(self._feed_evenly)
        self._grow_trees = GraphedRows(self._grow)
        self._draw_trees = GraphedRows(self._draw)
        self.drawing: Drawing | None = None

    def load(self, kernels: KernelSet) -> None:
        """Load the weights and bind the attention layers to the draft's trees."""
        vllm_config = self._vllm_config
        before = set(_attention_layers(vllm_config))
        # vLLM validates the copy anew, which writes into these parts of it.
        config = replace(
            vllm_config,
            model_config=self._model_config,
            quant_config=None,
            parallel_config=copy.copy(vllm_config.parallel_config),
            scheduler_config=copy.copy(vllm_config.scheduler_config),
        )
        try:
            with set_model_tag(self._prefix):
                self.model = get_model(vllm_config=config, prefix=self._prefix)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"draft_model {self.config.model!r} does not fit beside the target: "
                f"{error}; take a smaller or quantized draft, or more GPUs"
            ) from error
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"draft_model {self.config.model!r}: {error}") from error
        layers = _attention_layers(vllm_config)
        self.layer_names = set(layers) - before
        for name in self.layer_names:
            layers[name].is_draft_layer = True
            bind_layer(name, layers[name], kernels, self.grower.batch)

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        dtype: torch.dtype = self._model_config.dtype  # resolved by now
        return dtype

    def set_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Remember where each KV cache group keeps the blocks of this step's rows."""
        self._groups = [
            (names, table, block_size)
            for group, table, block_size in zip(
                kv_cache_config.kv_cache_groups,
                block_tables.input_block_tables,
                block_tables.block_sizes,
                strict=True,
            )
            if (names := self.layer_names & set(group.layer_names))
        ]

    def profile(self, num_tokens: int) -> None:
        """A forward without a cache, as large as they get, for vLLM's profiler."""
        token_ids = torch.zeros(num_tokens, dtype=torch.int32, device=self._device)
        hidden = self._run(token_ids, token_ids.long(), None, {})
        max_num_reqs = self._slots.shape[0]
        num_rows = max_num_reqs * max(self.grower.shape.num_rows)
        logits = self._logits(hidden[:1].expand(num_rows, -1))
        if self.drawing is not None:
            torch.empty_like(logits, dtype=torch.float32)  # with noise

    def capture(self) -> None:
        """Capture the catch-up of decoding requests and the growth of all levels."""
        max_num_reqs = self._slots.shape[0]
        self._feed_decodes.capture(min(max_num_reqs, self._max_num_even_reqs))
        self._grow_trees.capture(max_num_reqs)
        if self.drawing is not None:
            self._draw_trees.capture(max_num_reqs)

    def catch_up(
        self,
        batch: Any,
        num_sampled: torch.Tensor,
        temperatures: torch.Tensor,
    ) -> None:
        """Feed what the target computed this step, and the newest token.

        Args:
            batch: vLLM's ``InputBatch`` of the step.
            num_sampled: ``[num_reqs]`` int32, 0 for requests still in their prefill.
            temperatures: ``[max_num_reqs]`` float32, by slot, 0 for greedy.
        """
        num_reqs = batch.num_reqs
        rows = slice(num_reqs)
        lengths = np.diff(batch.query_start_loc_np[: num_reqs + 1])
        num_drafts = np.diff(batch.cu_num_logits_np[: num_reqs + 1]) - 1
        fed = lengths - num_drafts + np.minimum(num_drafts, self.max_accepted) + 1
        slots = batch.idx_mapping[rows]
        computed = torch.from_numpy(lengths.astype(np.int32))
        if self._device.type != "cpu":
            computed = computed.pin_memory().to(self._device, non_blocking=True)
        self._slots[rows] = slots
        self._starts[rows] = batch.seq_lens[rows] - computed
        self._ends[rows] = self._req_states.total_len.gpu[slots]
        self._active[rows] = num_sampled > 0
        self._temperatures[rows] = temperatures[slots].clamp(min=MIN_TEMPERATURE)
        # Rows that pad a CUDA graph write no KV and draft nothing.
        for rest in (self._slots, self._starts, self._ends, self._active):
            rest[num_reqs:] = 0
        if fed.max() <= self._even_width and num_reqs <= self._max_num_even_reqs:
            self._feed_decodes(num_reqs)
        else:
            self._feed(num_reqs, fed)

    def propose(self, num_reqs: int, *, draws: bool = False) -> None:
        """Grow the trees of the requests that ``catch_up`` was last called for.

        Args:
            draws: whether ``drawing`` says that some of them draw.
        """
        (self._draw_trees if draws else self._grow_trees)(num_reqs)

    def _feed_evenly(self, num_reqs: int) -> None:
        """As many rows for each request as a decoding one can need."""
        width = self._even_width
        starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=self._device)
        rows = torch.arange(num_reqs, device=self._device).repeat_interleave(
            width, output_size=num_reqs * width
        )
        self._feed_rows(num_reqs, rows, starts * width, width)

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

    def _feed_rows(
        self,
        num_reqs: int,
        rows: torch.Tensor,  # [num_tokens] int64, token -> batch row
        query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
        max_query_len: int,
    ) -> None:
        starts, ends = self._starts[:num_reqs], self._ends[:num_reqs]
        fed = query_start_loc.diff()
        offsets = torch.arange(rows.shape[0], device=self._device)
        positions = offsets - query_start_loc[rows] + starts[rows]
        all_token_ids = self._req_states.all_token_ids.gpu
        last = all_token_ids.shape[1] - 1
        token_ids = all_token_ids[self._slots[rows], positions.clamp(max=last)]
        # A row's tokens past the newest are padding. A table has no room behind its
        # end, so a request that near to it is not drafted for any more.
        fits = starts + fed <= self._table_len
        self._active[:num_reqs] &= fits
        is_fed = (positions < ends[rows]) & fits[rows]
        self.grower.batch.num_nodes.zero_()  # causal rows
        hidden = self._forward(
            token_ids,
            positions,
            torch.where(is_fed & (positions < self.max_len), positions, -1),
            rows,
            query_start_loc,
            (starts + fed).clamp(max=self._table_len),
            max_query_len,
        )
        newest = query_start_loc[:-1] + (ends - 1 - starts).clamp(min=0)
        newest = torch.minimum(newest, query_start_loc[1:] - 1)
        self._newest_hidden[:num_reqs] = hidden[newest]

    def _draw(self, num_reqs: int) -> None:
        self._grow(num_reqs, self.drawing)

    def _grow(self, num_reqs: int, drawing: Drawing | None = None) -> None:
        roots = self._ends[:num_reqs] - 1

        def forward(frontier: Frontier) -> torch.Tensor:
            width = frontier.token_ids.shape[1]
            nodes = frontier.first_node + torch.arange(width, device=self._device)
            caches = (roots[:, None] + nodes).long()
            writes = frontier.in_range[:, None]
            positions = roots.long() + frontier.depth
            rows = torch.arange(num_reqs, device=self._device)
            starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=self._device)
            num_nodes = frontier.first_node + width
            hidden = self._forward(
                frontier.token_ids.flatten(),
                positions.repeat_interleave(width, output_size=num_reqs * width),
                torch.where(writes, caches, -1).flatten(),
                rows.repeat_interleave(width, output_size=num_reqs * width),
                starts * width,
                (roots + num_nodes).clamp(min=num_nodes, max=self._table_len),
                width,
            )
            return self._logits(hidden)

        self.grower.grow(
            self._logits(self._newest_hidden[:num_reqs]),
            roots,
            self.max_len,
            self._active[:num_reqs],
            self._temperatures[:num_reqs],
            forward,
            self._out,
            drawing,
        )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.compute_logits(hidden)
        return logits[:, : self._target_vocab_size]

    def _forward(
        self,
        token_ids: torch.Tensor,  # [num_tokens] int32
        positions: torch.Tensor,  # [num_tokens] int64, may lie behind the draft's end
        cache_positions: torch.Tensor,  # [num_tokens] int64, -1: keep no KV
        rows: torch.Tensor,  # [num_tokens] int64, token -> batch row
        query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
        seq_lens: torch.Tensor,  # [num_reqs] int32
        max_query_len: int,
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        metadata: dict[str, TreeMetadata] = {}
        slot_mappings: dict[str, torch.Tensor] = {}
        is_kept = cache_positions >= 0
        places = cache_positions.clamp(min=0)
        for names, table, block_size in self._groups:
            blocks = table[rows, places // block_size].long()
            slots = blocks * block_size + places % block_size
            slots = torch.where(is_kept, slots, PAD_SLOT_ID)
            group_metadata = TreeMetadata(
                query_start_loc, seq_lens, table[: seq_lens.shape[0]], max_query_len
            )
            for name in names:
                metadata[name], slot_mappings[name] = group_metadata, slots
        positions = positions.clamp(max=self.max_len - 1)
        return self._run(token_ids, positions, metadata, slot_mappings)

    def _run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: dict[str, TreeMetadata] | None,
        slot_mappings: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        num_tokens = token_ids.shape[0]
        token_ids = token_ids.clamp(max=self._vocab_size - 1)
        with set_forward_context(
            metadata,
            self._vllm_config,
            num_tokens=num_tokens,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
        ):
            hidden = self.model(input_ids=token_ids, positions=positions)
        # Some models also return what an EAGLE head would read.
        only: torch.Tensor = hidden[0] if isinstance(hidden, tuple) else hidden
        return only


def _attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    layers: dict[str, Any] = get_layers_from_vllm_config(
        vllm_config, AttentionLayerBase
    )
    return layers
