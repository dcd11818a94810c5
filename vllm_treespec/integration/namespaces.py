"""Whose memory a request belongs to: vLLM's ``cache_salt``, on its way to the worker.

The salt keeps tenants' prefix caches apart, so that nobody can tell by timing what
another one asked. What proposers remember is kept apart by the same salt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from vllm_treespec.integration.engine_args import has_trees

NAMESPACE = "treespec_namespace"  # the attribute of a NewRequestData
SHARED = 0  # of all requests without a salt


def namespace_of(cache_salt: str | None) -> int:
    """64 bits that are another salt's by chance only, or ``SHARED``."""
    if not cache_salt:
        return SHARED
    digest = blake2b(cache_salt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1


def wrap_note_namespaces(original: Callable[..., None]) -> Callable[..., None]:
    """Tell workers the namespaces of the requests that are new to them."""

    @functools.wraps(original)
    def update(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        if has_trees(self.vllm_config):
            for new in scheduler_output.scheduled_new_reqs:
                salt = self.requests[new.req_id].cache_salt
                setattr(new, NAMESPACE, namespace_of(salt))

    return update
