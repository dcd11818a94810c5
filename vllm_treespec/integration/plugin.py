"""Entry point. vLLM calls it in every one of its processes, so it stays cheap."""

from __future__ import annotations


def register() -> None:
    """Install the patches; safe to call more than once."""
    from vllm_treespec.integration.seams import PATCHES

    for patch in PATCHES:
        patch.install()
