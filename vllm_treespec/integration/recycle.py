"""Token recycling in the engine: fed by verification, drafting where the tokens are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig

from vllm_treespec.config import RecycleConfig
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.propose.recycle import NONE, NUM_PAIRS, Contexts, Recycler
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths
from vllm_treespec.integration.cuda_graphs import GraphedRows

logger = logging.getLogger(f"vllm.{__name__}")


class Recycle:
    """One table of successors for all requests. Every rank keeps its own: all of them
    see the same logits, and learning from those has one outcome."""

    def __init__(
        self,
        config: RecycleConfig,
        vllm_config: VllmConfig,
        *,
        index: int,
        req_states: Any,
        out: DeviceCandidates,
        device: torch.device,
    ) -> None:
        """
        Args:
            index: the proposer's, in the configuration's order.
            req_states: vLLM's ``RequestState``, whose newest tokens are the roots.
            out: where ``propose`` writes.
        """
        self.index = index
        self._req_states = req_states
        self._out = out
        self._device = device
        vocab_size = vllm_config.model_config.get_vocab_size()
        self.recycler = Recycler(
            vocab_size=vocab_size,
            k=config.k,
            depth=config.depth,
            max_nodes=out.token_ids.shape[1],
            device=device,
        )
        logger.info(
            "treespec: recycle keeps %d successors of each of %d tokens and %d pairs in "
            "%.1f MiB of device memory",
            config.k,
            vocab_size,
            NUM_PAIRS,
            self.recycler.table.num_bytes / 2**20,
        )
        self._max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        # This step's requests in batch order, where CUDA graphs look for them.
        self._before = torch.zeros(self._max_num_reqs, dtype=torch.int64, device=device)
        self._roots = torch.zeros_like(self._before)
        self._active = torch.zeros_like(self._before, dtype=torch.bool)
        self._grow = GraphedRows(self._grow_rows)

    def capture(self) -> None:
        """Capture the growth of all levels."""
        self._grow.capture(self._max_num_reqs)

    def add_prompt(self, token_ids: Sequence[int]) -> None:
        """A request begins, or goes on after it was preempted."""
        prompt = torch.from_numpy(np.asarray(token_ids, np.int64))
        if self._device.type != "cpu":
            prompt = prompt.pin_memory().to(self._device, non_blocking=True)
        self.recycler.learn_prompt(prompt)

    def learn(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size], one row per node
        batch: Any,  # vLLM's InputBatch
        trees: TreeBuffers,  # those that were verified
        paths: AcceptedPaths,
        sampled: torch.Tensor,  # [num_reqs, max_num_nodes] int64
        num_sampled: torch.Tensor,  # [num_reqs] int32
    ) -> None:
        """See a verified step. Prompts' last tokens are roots without a tree."""
        num_reqs, num_logits = batch.num_reqs, logits.shape[0]
        slots = batch.idx_mapping[:num_reqs]
        first_rows = batch.cu_num_logits[: num_reqs + 1].long()
        rows = torch.repeat_interleave(first_rows.diff(), output_size=num_logits)
        nodes = torch.arange(num_logits, device=logits.device) - first_rows[rows]
        path = paths.nodes[:num_reqs].long()
        on_path = (
            torch.arange(path.shape[1], device=path.device)
            <= paths.lengths[:num_reqs, None]
        )
        # One place more takes what is behind the paths.
        picks = sampled.new_full((num_logits + 1,), NONE)
        path_rows = torch.where(on_path, first_rows[:-1, None] + path, num_logits)
        picks.scatter_(0, path_rows.flatten(), sampled.flatten())
        picks = picks[:-1]
        token_ids = batch.input_ids[batch.logits_indices].long()
        places = batch.positions[batch.logits_indices][first_rows[:-1]]
        before_root = self._token_before(slots, places)
        # Those of padding are stale, and may point behind the logits.
        parents = torch.minimum(trees.parents[slots[rows], nodes].clamp(min=0), nodes)
        before = torch.where(
            nodes == 0, before_root[rows], token_ids[first_rows[rows] + parents]
        )
        is_node = nodes < trees.num_nodes[slots[rows]]
        contexts = Contexts(before, torch.where(is_node, token_ids, NONE))
        roots = Contexts(before_root, token_ids[first_rows[:-1]])
        self.recycler.learn_rates(roots, sampled, num_sampled)
        self.recycler.learn_nodes(contexts, logits, picks)

    def _token_before(self, slots: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The committed tokens before these positions, NONE where a text begins."""
        before = self._req_states.all_token_ids.gpu[slots, (places - 1).clamp(min=0)]
        return torch.where(places > 0, before.long(), NONE)

    def catch_up(
        self, batch: Any, num_sampled: torch.Tensor, temperatures: torch.Tensor
    ) -> None:
        """Find the newest tokens; no request in its prefill has one to continue."""
        slots = batch.idx_mapping[: batch.num_reqs]
        states, num_reqs = self._req_states, batch.num_reqs
        newest = (states.total_len.gpu[slots] - 1).clamp(min=0)
        self._roots[:num_reqs] = states.all_token_ids.gpu[slots, newest]
        self._before[:num_reqs] = self._token_before(slots, newest)
        self._active[:num_reqs] = num_sampled > 0
        self._active[num_reqs:] = False

    def propose(self, num_reqs: int, *, draws: bool = False) -> int:
        """Grow the trees of the requests that ``catch_up`` was last called for; returns
        the candidates that one has at most. It never draws."""
        assert not draws, "the first model draws, and models come first"
        self._grow(num_reqs)
        return self.recycler.num_candidates

    def clear(self) -> None:
        self.recycler.clear()

    def _grow_rows(self, num_reqs: int) -> None:
        roots = Contexts(self._before[:num_reqs], self._roots[:num_reqs])
        self.recycler.grow(roots, self._active[:num_reqs], self._out)
