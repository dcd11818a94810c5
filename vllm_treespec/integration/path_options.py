"""Request options that look back: along each node's own path instead of a chain.

vLLM's sampler treats a request's logits rows as a chain of drafts. Where an option
depends on the drafts before a row, its processor is replaced by one that climbs the
tree; the state behind it stays vLLM's own, which is told of every emitted token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState

if TYPE_CHECKING:
    from vllm_treespec.core.kernel_set import KernelSet
    from vllm_treespec.core.tree import TreeBuffers


class PathProcessor:
    """One of vLLM's logits processors, with our ``apply``."""

    def __init__(self, state: Any, kernels: KernelSet, trees: TreeBuffers) -> None:
        self._state = state
        self._kernels = kernels
        self._trees = trees

    def add_request(self, slot: int, sampling_params: Any) -> bool:
        return bool(self._state.add_request(slot, sampling_params))

    def apply_staged_writes(self) -> None:
        self._state.apply_staged_writes()


class PathPenalties(PathProcessor):
    """Repetition, frequency and presence penalties."""

    def apply(self, logits: torch.Tensor, context: Any) -> torch.Tensor:
        state, trees = self._state, self._trees
        if np.any(state.use_penalty[context.idx_mapping_np]):
            self._kernels.penalize_paths(
                logits,
                context.expanded_idx_mapping,
                context.expanded_local_pos,
                trees.token_ids,
                trees.parents,
                state.repetition_penalty.gpu,
                state.frequency_penalty.gpu,
                state.presence_penalty.gpu,
                state.prompt_bin_mask,
                state.output_bin_counts,
            )
        return logits


class PathBadWords(PathProcessor):
    """Words that must not be completed."""

    def apply(self, logits: torch.Tensor, context: Any) -> torch.Tensor:
        state, trees = self._state, self._trees
        max_num_words = int(state.num_bad_words.np[context.idx_mapping_np].max())
        if max_num_words > 0:
            self._kernels.ban_words(
                logits,
                context.expanded_idx_mapping,
                context.expanded_local_pos,
                trees.token_ids,
                trees.parents,
                state.bad_word_token_ids.gpu,
                state.bad_word_offsets.gpu,
                state.num_bad_words.gpu,
                state.req_states.all_token_ids.gpu,
                state.req_states.prompt_len.gpu,
                state.req_states.total_len.gpu,
                max_num_words,
            )
        return logits


def follow_paths(sampler: Any, kernels: KernelSet, trees: TreeBuffers) -> None:
    """Replace the sampler's processors that would look back along a chain."""
    on_paths: dict[type, type[PathProcessor]] = {
        BadWordsState: PathBadWords,
        PenaltiesState: PathPenalties,
    }
    sampler.logits_processors = [
        on_paths[type(each)](each, kernels, trees) if type(each) in on_paths else each
        for each in sampler.logits_processors
    ]
