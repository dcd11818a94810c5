"""Which requests get a chain instead of a tree, and why.

A chain is a degenerate tree that vLLM's own code understands. It serves request
options whose implementation looks back along a chain of drafts.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState

logger = logging.getLogger(f"vllm.{__name__}")


def chain_reason(sampling_params: Any, *, has_custom_processors: bool) -> str | None:
    """Why this request's drafts must be a chain; None if a tree will do."""
    if sampling_params is None:
        return "pooling"
    if sampling_params.thinking_token_budget is not None:
        return "thinking_budget"
    if has_custom_processors:
        return "logits_processors"
    return None


def has_custom_processors(sampler: Any) -> bool:
    """Whether the sampler runs logits processors that are not vLLM's own."""
    built_in = (BadWordsState, LogitBiasState, PenaltiesState)
    return any(type(each) not in built_in for each in sampler.logits_processors)


def count_fallback(fallbacks: Counter[str], reason: str) -> None:
    """Count a request, again if it was preempted; say so the first time."""
    if not fallbacks[reason]:
        logger.info(
            "treespec: a request with %s is drafted for as a chain, and so will be "
            "all others like it",
            reason,
        )
    fallbacks[reason] += 1
