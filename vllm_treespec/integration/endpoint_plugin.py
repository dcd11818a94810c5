"""Adds our endpoints to a server that was asked for trees.

vLLM itself loads endpoints only by name (``VLLM_PLUGINS``), which switches off every
plugin that is not named, and warns of those that it leaves out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap_load_endpoint_plugins(
    original: Callable[..., list[Any]],
) -> Callable[..., list[Any]]:
    """Ours behind the others."""

    @functools.wraps(original)
    def load(supported_tasks: Any = None) -> list[Any]:
        # Imported late: engines and workers serve no HTTP.
        from vllm_treespec.integration.endpoints import TreeEndpoints

        ours = [TreeEndpoints()] if "generate" in (supported_tasks or ()) else []
        return [*original(supported_tasks), *ours]

    return load
