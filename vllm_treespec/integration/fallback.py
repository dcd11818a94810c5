"""Which requests get a chain instead of a tree, and why.

A chain is a degenerate tree that vLLM's own code understands. It serves request
options whose implementation looks back along a chain of drafts.
"""

from __future__ import annotations

from typing import Any


def chain_reason(sampling_params: Any, vllm_config: Any) -> str | None:
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
    if vllm_config.model_config.logits_processors:
        return "logits_processors"
    return None
