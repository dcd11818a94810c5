"""Proposers that draft on the device: those that run a model, then the table."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig

from vllm_treespec.config import (
    DraftModelConfig,
    LayerSkipConfig,
    RecycleConfig,
    TreeSpecConfig,
)
from vllm_treespec.core.build import TreeBuilder
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths
from vllm_treespec.integration.device_draft import DeviceDraft
from vllm_treespec.integration.draft_model import DraftModel
from vllm_treespec.integration.layer_skip import LayerSkip
from vllm_treespec.integration.node_rows import VerifiedRows
from vllm_treespec.integration.recycle import Recycle
from vllm_treespec.integration.worth import Worth

logger = logging.getLogger(f"vllm.{__name__}")


class DeviceDrafts:
    """Asks each of them once a step. One that raises is dismissed with one log line."""

    def __init__(
        self,
        config: TreeSpecConfig,
        vllm_config: VllmConfig,
        *,
        kernels: KernelSet,
        builder: TreeBuilder,  # whose candidates they write
        worth: Worth,
        ranks: Any,
        req_states: Any,
        device: torch.device,
    ) -> None:
        self._names = config.proposer_names
        self._builder = builder
        self._worth = worth
        self._ranks = ranks
        # By the proposer's index, without those that were dismissed.
        self.models: dict[int, DeviceDraft] = {}
        self.recycle: Recycle | None = None
        self.faulty: set[int] = set()
        for index, each in enumerate(config.proposers):
            shared: dict[str, Any] = {
                "req_states": req_states,
                "out": builder.candidates.of(index),
                "device": device,
            }
            num_drawn = config.num_drawn if index == 0 else 0
            if isinstance(each, LayerSkipConfig):
                self.models[index] = LayerSkip(
                    each, vllm_config, num_drawn=num_drawn, **shared
                )
            elif isinstance(each, DraftModelConfig):
                self.models[index] = DraftModel(
                    each,
                    vllm_config,
                    num_drawn=num_drawn,
                    max_accepted=config.max_depth,
                    prefix=f"draft_model_{index}",
                    **shared,
                )
            elif isinstance(each, RecycleConfig):
                self.recycle = Recycle(
                    each, vllm_config, index=index, kernels=kernels, **shared
                )

    @property
    def with_own_weights(self) -> list[DraftModel]:
        return [each for each in self.models.values() if isinstance(each, DraftModel)]

    @property
    def shared_index(self) -> int | None:
        """Of the proposer that remembers the text of all requests in one table."""
        return None if self.recycle is None else self.recycle.index

    def capture(self) -> None:
        """Capture CUDA graphs; inside vLLM's ``graph_capture``."""
        for model in self.models.values():
            model.capture()

    def release_graphs(self) -> None:
        """Forget the CUDA graphs; there will be another KV cache."""
        for model in self.models.values():
            model.release_graphs()

    def add_request(self, slot: int, num_computed: int) -> None:
        """A request begins, or goes on after it was preempted.

        Args:
            num_computed: of its tokens, those that the target has in its cache.
        """
        for model in self.models.values():
            model.add_request(slot, num_computed)

    def add_prompt(self, token_ids: Sequence[int]) -> None:
        """The text of one that all others may learn from."""
        if self.recycle is not None:
            with self._tried(self.recycle.index):
                self.recycle.add_prompt(token_ids)

    def draft(
        self,
        input_batch: Any,
        num_sampled: torch.Tensor,  # [num_reqs] int32
        temperature: torch.Tensor,
        wanted: npt.NDArray[np.bool_],  # [num_proposers, num_reqs], whose drafts
        *,
        draws: bool,
    ) -> npt.NDArray[np.int32]:  # [num_reqs]
        """Let those catch up and grow trees whose drafts are wanted; returns nodes
        offered to each request at most."""
        num_reqs = input_batch.num_reqs
        offered = np.zeros(num_reqs, np.int32)
        proposers: dict[int, DeviceDraft | Recycle] = dict(self.models)
        if self.recycle is not None:
            proposers[self.recycle.index] = self.recycle
        for index, proposer in proposers.items():
            nodes = 0
            proposer.pass_by(input_batch)
            if wanted[index].any():
                with self._tried(index):
                    proposer.catch_up(input_batch, num_sampled, temperature)
                    nodes = proposer.propose(num_reqs, draws=draws and index == 0)
            else:
                proposer.rest()
            if nodes:
                offered += nodes * wanted[index]
            else:
                self._builder.forget(index, num_reqs)
        return offered

    def learn(
        self,
        trees: TreeBuffers,
        paths: AcceptedPaths,
        slots: torch.Tensor,  # [num_reqs] int64
    ) -> None:
        """Models see which of their nodes were accepted."""
        for index, model in self.models.items():
            model.learn(trees, paths, slots, index)

    def learn_logits(self, step: VerifiedRows) -> None:
        """The table sees what the target found likely at every node."""
        recycle = self.recycle
        if recycle is not None and self._worth.drafting[recycle.index]:
            with self._tried(recycle.index):
                recycle.learn(step)

    def clear(self) -> None:
        """Forget all text that was learned from."""
        if self.recycle is not None:
            self.recycle.clear()

    @contextmanager
    def _tried(self, index: int) -> Iterator[None]:
        """Time what a proposer does, and go on without it if it fails."""
        try:
            with self._worth.stopwatch.measure(index):
                yield
        except Exception:  # it may cost speed, never a request
            if self._ranks.world_size > 1:
                raise  # the other ranks have not failed, and would draft other trees
            self._dismiss(index)

    def _dismiss(self, index: int) -> None:
        logger.exception(
            "treespec: proposer %r failed and is off until restart; requests go on "
            "without it",
            self._names[index],
        )
        self.faulty.add(index)
        if self.models.pop(index, None) is None:
            self.recycle = None
            self._builder.candidates.num_candidates[index] = 0
