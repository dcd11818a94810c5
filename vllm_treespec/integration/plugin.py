"""Entry point. vLLM calls it in every one of its processes, so it stays cheap."""

from __future__ import annotations

import logging

logger = logging.getLogger(f"vllm.{__name__}")


def register() -> None:
    """Install the patches, all or none; safe to call more than once.

    Who does not ask for treespec loses nothing to a vLLM that it does not know.
    """
    try:
        from vllm_treespec.integration.seams import install

        install()
    except (ImportError, AttributeError, RuntimeError) as moved:
        logger.warning("treespec: %s", refusal(moved))


def refusal(moved: Exception) -> str:
    """What follows from a place in vLLM that is not as expected."""
    from vllm import __version__

    return (
        f"vLLM {__version__} is not one that treespec fits (supported: {SUPPORTED}), "
        f"so it changes nothing and 'method: treespec' is refused: {moved}"
    )


SUPPORTED = "0.32 and 0.33"
