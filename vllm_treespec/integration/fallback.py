"""Which requests get a chain instead of a tree, and why.

A chain is a degenerate tree that vLLM's own code understands. It serves request
options whose implementation looks back along a chain of drafts.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState


def chain_reason(sampling_params: Any, has_custom_processors: bool) -> str | None:
    """Why this request's drafts must be a chain; None if a tree will do."""
    if sampling_params is None:
        return "pooling"
    if (
        sampling_params.repetition_penalty != 1.0
        or sampling_params.presence_penalty != 0.0
        or sampling_params.frequency_penalty != 0.0
    ):
        return "penalties"
    if sampling_params.bad_words:
        return "bad_words"
    if sampling_params.structured_outputs is not None:
        return "structured_outputs"
    if sampling_params.thinking_token_budget is not None:
        return "thinking_budget"
    if has_custom_processors:
        return "logits_processors"
    return None


def has_custom_processors(sampler: Any) -> bool:
    """Whether the sampler runs logits processors that are not vLLM's own."""
    built_in = (BadWordsState, LogitBiasState, PenaltiesState)
    return any(type(each) not in built_in for each in sampler.logits_processors)
