"""What grows a tree per request on the device, level by level, through vLLM's layers.

The draft's layers read the target's block tables. What they write for a tree's nodes
lies behind the newest token and is overwritten later, so nothing has to be moved when
a path is accepted.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_treespec.config import DeviceConfig
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.observe import accepted_levels
from vllm_treespec.core.propose.draft_tree import MIN_TEMPERATURE, Frontier, TreeGrower
from vllm_treespec.core.propose.drawing import Drawing
from vllm_treespec.core.propose.early_stop import EarlyStop
from vllm_treespec.core.propose.factory import make_shape
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths
from vllm_treespec.integration.attention import TreeMetadata
from vllm_treespec.integration.cuda_graphs import GraphedRows
from vllm_treespec.integration.sizing import max_num_drafting, tiers


class DeviceDraft(ABC):
    """A model whose cache holds everything up to the newest token, once it was fed."""

    model: Any
    layer_names: set[str]  # of its attention layers
    own_layer_names: frozenset[str] = frozenset()  # those that are not the target's

    def __init__(
        self,
        config: DeviceConfig,
        vllm_config: VllmConfig,
        model_config: ModelConfig,
        *,
        num_drawn: int,
        max_accepted: int,
        req_states: Any,
        out: DeviceCandidates,
        device: torch.device,
        stop: EarlyStop | None = None,
    ) -> None:
        """
        Args:
            model_config: the draft's.
            num_drawn: nodes of a tree that it draws for sampled requests, 0 for none.
            max_accepted: nodes that a step can accept at most and that its feeding has
                to make up for.
            req_states: vLLM's ``RequestState``, whose tokens the draft is fed.
            out: where ``propose`` writes.
            stop: None captures all levels in one graph; else the host looks after
                each level whether to go on.
        """
        self.config = config
        self._vllm_config = vllm_config
        self._model_config = model_config
        self._req_states = req_states
        self._out = out
        self._device = device
        self._max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        # Larger batches have no drafts: no logits of theirs, and no graphs.
        self._max_num_drafting = max_num_drafting(vllm_config)
        num_nodes = vllm_config.num_speculative_tokens
        shape = make_shape(config, num_nodes, device, num_drawn)
        self._stop = stop
        self.grower = TreeGrower(
            shape,
            self._max_num_reqs,
            device,
            min_reach=None if stop is None else stop.threshold,
        )
        self._max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens

        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(self._max_num_reqs, dtype=dtype, device=device)

        # This step's requests in batch order, where CUDA graphs look for them.
        self._slots = zeros(torch.int64)
        self._starts = zeros(torch.int32)  # first position that is fed
        self._ends = zeros(torch.int32)  # behind the newest token
        self._active = zeros(torch.bool)
        self._temperatures = zeros(torch.float32) + 1
        self._drafted = zeros(torch.int64)  # levels of waiting trees, by slot
        # Both may have ids that mean nothing, behind the vocabulary that they share.
        self._vocab_size = model_config.get_vocab_size()
        self._target_vocab_size = vllm_config.model_config.get_vocab_size()
        self._newest_hidden = torch.zeros(
            self._max_num_reqs,
            model_config.get_hidden_size(),
            dtype=model_config.dtype,
            device=device,
        )
        self.drawing: Drawing | None = None
        # By the rows that each request of a batch is fed: what its step may have
        # emitted at most, in each of the schedule's tiers; and the most such requests.
        self._feed_decodes: dict[int, GraphedRows] = {}
        self._max_num_even: dict[int, int] = {}
        for _, last, nodes in [*tiers(vllm_config), (1, self._max_num_drafting, 0)]:
            width = min(nodes, max_accepted) + 1
            run = partial(self._feed_evenly, width=width)
            self._feed_decodes[width] = GraphedRows(run)
            self._max_num_even[width] = min(
                self._max_num_drafting,
                self._max_num_tokens // width,
                max(last, self._max_num_even.get(width, 0)),
            )
        # By whether requests draw. In one piece, or level by level with an end.
        self._grow_all = [
            GraphedRows(partial(self._grow, draws=d)) for d in (False, True)
        ]
        self._grow_level = [
            [
                GraphedRows(partial(self._level, level=level, draws=d))
                for level in range(self.grower.depth)
            ]
            for d in (False, True)
        ]
        self._finish = [
            GraphedRows(partial(self._rank, draws=d)) for d in (False, True)
        ]

    @abstractmethod
    def load(self, kernels: KernelSet, target: torch.nn.Module) -> None:
        """Make ``model`` and ``layer_names``; the target is loaded and bound."""

    def add_request(self, slot: int, num_computed: int) -> None:  # noqa: B027
        """A request took the slot, whose first tokens are in the target's cache."""

    def pass_by(self, batch: Any) -> None:  # noqa: B027
        """A step was verified; vLLM's ``InputBatch`` of it."""

    def rest(self) -> None:  # noqa: B027
        """Nobody wants drafts of the step; it need not catch up with it."""

    @abstractmethod
    def catch_up(
        self, batch: Any, num_sampled: torch.Tensor, temperatures: torch.Tensor
    ) -> None:
        """Feed what the draft's cache lacks, and the newest token.

        Args:
            batch: vLLM's ``InputBatch`` of the step.
            num_sampled: ``[num_reqs]`` int32, 0 for requests still in their prefill.
            temperatures: ``[max_num_reqs]`` float32, by slot, 0 for greedy.
        """

    def learn(
        self,
        trees: TreeBuffers,
        paths: AcceptedPaths,
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        proposer: int,  # whose nodes in ``trees.proposers`` are this draft's
    ) -> None:
        """See what became of the last trees, before they are replaced."""
        if self._stop is None:
            return
        accepted = accepted_levels(
            trees.proposers[slots],
            paths.nodes[: slots.shape[0]],
            paths.lengths[: slots.shape[0]],
            proposer,
        )
        self._stop.learn(accepted, self._drafted[slots])
        self._drafted[slots] = 0

    # vLLM may shorten requests to what the KV cache holds, once models were profiled.
    @property
    def _table_len(self) -> int:
        """Positions that block tables have room for."""
        length: int = self._vllm_config.model_config.max_model_len
        return length

    @property
    def max_len(self) -> int:
        """Positions that the draft may use."""
        own: int = self._model_config.max_model_len
        return min(own, self._table_len)

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
        num_rows = self._max_num_drafting * max(self.grower.shape.num_rows)
        logits = self._logits(hidden[:1].expand(num_rows, -1))
        if self.drawing is not None:
            torch.empty_like(logits, dtype=torch.float32)  # with noise

    def capture(self) -> None:
        """Capture the feeding of decoding requests and the growth of all levels."""
        for width, graphs in self._feed_decodes.items():
            graphs.capture(self._max_num_even[width])
        for draws in (False, True) if self.drawing is not None else (False,):
            pieces = [self._grow_all[draws]]
            if self._stop is not None:
                pieces = [*self._grow_level[draws], self._finish[draws]]
            for piece in pieces:
                piece.capture(self._max_num_drafting)

    def release_graphs(self) -> None:
        """Forget all graphs; there will be another KV cache."""
        feeds, growth = self._feed_decodes.values(), [*self._grow_all, *self._finish]
        for graphs in (*feeds, *growth, *itertools.chain(*self._grow_level)):
            graphs.release()

    def propose(self, num_reqs: int, *, draws: bool = False) -> int:
        """Grow the trees of the requests that ``catch_up`` was last called for; returns
        the candidates that one has at most.

        Args:
            draws: whether ``drawing`` says that some of them draw.
        """
        if self._stop is None:
            self._grow_all[draws](num_reqs)
            return self.grower.num_candidates
        num_levels = 0
        for num_levels, level in enumerate(self._grow_level[draws], 1):
            level(num_reqs)
            if not self.grower.goes_on(num_levels - 1):
                break
        self._finish[draws](num_reqs)
        self._drafted[self._slots[:num_reqs]] = self.grower.num_levels[:num_reqs]
        return self.grower.num_candidates_at[num_levels]

    def _set_rows(
        self,
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        starts: torch.Tensor,  # [num_reqs] int32, first position that is fed
        ends: torch.Tensor,  # [num_reqs] int32, behind the newest token
        active: torch.Tensor,  # [num_reqs] bool
        temperatures: torch.Tensor,  # [max_num_reqs] float32, by slot, 0 for greedy
    ) -> None:
        """Say whom this step is for. Rows that pad a CUDA graph write no KV and draft
        nothing."""
        num_reqs = slots.shape[0]
        for buffer, values in (
            (self._slots, slots),
            (self._starts, starts),
            (self._ends, ends),
            (self._active, active),
        ):
            buffer[:num_reqs] = values
            buffer[num_reqs:] = 0
        self._temperatures[:num_reqs] = temperatures[slots].clamp(min=MIN_TEMPERATURE)

    def _feed_evenly(self, num_reqs: int, *, width: int) -> None:
        """As many rows for each request."""
        starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=self._device)
        rows = torch.arange(num_reqs, device=self._device).repeat_interleave(
            width, output_size=num_reqs * width
        )
        self._feed_rows(num_reqs, rows, starts * width, width)

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
        self._active[:num_reqs] &= fits & (starts + fed >= ends)
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

    def _grow(self, num_reqs: int, *, draws: bool) -> None:
        for level in range(self.grower.depth):
            self._level(num_reqs, level=level, draws=draws)
        self._rank(num_reqs, draws=draws)

    def _level(self, num_reqs: int, *, level: int, draws: bool) -> None:
        roots, grower = self._ends[:num_reqs] - 1, self.grower
        if level == 0:
            grower.begin(roots, self.max_len, self._active[:num_reqs])
            logits = self._logits(self._newest_hidden[:num_reqs])
        else:
            logits = self._run_frontier(grower.frontier(level, num_reqs), roots)
        grower.add_level(
            level,
            logits,
            roots,
            self._temperatures[:num_reqs],
            self.drawing if draws else None,
        )

    def _rank(self, num_reqs: int, *, draws: bool) -> None:
        self.grower.finish(num_reqs, self._out, self.drawing if draws else None)

    def _run_frontier(self, frontier: Frontier, roots: torch.Tensor) -> torch.Tensor:
        """Logits ``[num_reqs * num_rows, vocab_size]`` of a level's rows.

        Args:
            roots: ``[num_reqs]`` int32, positions of the newest tokens.
        """
        num_reqs, width = frontier.token_ids.shape
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
                query_start_loc,
                seq_lens,
                table[: seq_lens.shape[0]],
                max_query_len,
                self.grower.batch,
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
