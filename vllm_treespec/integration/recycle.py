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
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.propose.recycle import NUM_PAIRS, Contexts, Recycler
from vllm_treespec.core.transfer import pinned
from vllm_treespec.integration.node_rows import VerifiedRows
from vllm_treespec.kernels.recycling import NONE

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
        kernels: KernelSet,
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
        self._kernels = kernels
        self._req_states = req_states
        self._out = out
        self._device = device
        vocab_size = vllm_config.model_config.get_vocab_size()
        self.recycler = Recycler(
            kernels,
            vocab_size=vocab_size,
            k=config.k,
            depth=config.depth,
            max_nodes=out.token_ids.shape[1],
            max_num_reqs=vllm_config.scheduler_config.max_num_seqs,
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

    def add_prompt(self, token_ids: Sequence[int]) -> None:
        """A request begins, or goes on after it was preempted."""
        prompt = pinned(np.asarray([NONE, *token_ids], np.int64), self._device)
        self.recycler.learn_prompt(prompt.to(self._device, non_blocking=True))

    def pass_by(self, batch: Any) -> None:
        """Verification has fed it."""

    def rest(self) -> None:
        pass

    def catch_up(
        self, batch: Any, num_sampled: torch.Tensor, temperatures: torch.Tensor
    ) -> None:
        """Requests in their prefill sampled nothing and have nothing to continue."""
        self._slots, self._num_sampled = batch.idx_mapping, num_sampled

    def propose(self, num_reqs: int, *, draws: bool = False) -> int:
        """Grow the trees of the requests that ``catch_up`` was last called for; returns
        the candidates that one has at most. It never draws."""
        assert not draws, "the first model draws, and models come first"
        states, roots = self._req_states, self._allocate(2, num_reqs)
        self._kernels.read_roots(
            self._slots, states.total_len.gpu, states.all_token_ids.gpu, roots
        )
        self.recycler.grow(Contexts(*roots), self._num_sampled, self._out)
        return self.recycler.num_candidates

    def clear(self) -> None:
        self.recycler.clear()

    def learn(self, step: VerifiedRows) -> None:
        """See a verified step. Prompts' last tokens are roots without a tree."""
        batch = step.batch
        contexts = self._allocate(3, step.logits.shape[0])
        roots = self._allocate(2, batch.num_reqs)
        self._kernels.read_nodes(
            batch.idx_mapping,
            batch.cu_num_logits,
            batch.logits_indices,
            batch.input_ids,
            batch.positions,
            self._req_states.all_token_ids.gpu,
            step.trees.parents,
            step.trees.num_nodes,
            step.paths.nodes,
            step.paths.lengths,
            step.sampled,
            contexts,
            roots,
        )
        before, token_ids, picks = contexts
        self.recycler.learn_rates(Contexts(*roots), step.sampled, step.num_sampled)
        self.recycler.learn_nodes(Contexts(before, token_ids), step.logits, picks)

    def _allocate(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self._device)
