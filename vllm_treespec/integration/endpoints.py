"""``POST /treespec/clear``: forget all text that proposers have learned from.

vLLM loads endpoint plugins only if ``VLLM_PLUGINS`` names them.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response

from vllm_treespec.integration.engine_args import has_trees

logger = logging.getLogger(f"vllm.{__name__}")


class TreeEndpoints:
    """vLLM's ``EndpointPlugin``."""

    name = "treespec"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route("/treespec/clear", clear, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """The route asks the client that vLLM keeps in the state."""


async def clear(request: Request) -> Response:
    """Has every worker of every engine forget; what requests that go on have said so
    far is learned anew."""
    client = request.app.state.engine_client
    if not has_trees(client.vllm_config):
        raise HTTPException(404, "this server runs without treespec")
    await client.collective_rpc("treespec_clear")
    logger.info("treespec: proposers have forgotten what they learned, as asked")
    return Response(status_code=200)
