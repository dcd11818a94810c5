"""Sessions whose input is streamed: a turn may end inside an accepted path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_treespec.integration.engine_args import has_trees


def wrap_handle_stopped_request(original: Callable[..., bool]) -> Callable[..., bool]:
    """Count as computed only tokens that the turn kept, all but its last.

    vLLM 0.32 counts the whole accepted path, without async scheduling: the next turn
    would keep a token too many, and read the KV of dropped ones as its own.
    """

    @functools.wraps(original)
    def handle(self: Any, request: Any) -> bool:
        if has_trees(self.vllm_config):
            frontier = request.num_computed_tokens - request.num_output_placeholders
            request.num_computed_tokens -= max(0, frontier - (request.num_tokens - 1))
        return original(self, request)

    return handle
