"""``POST /treespec/clear``: forget all text that proposers have learned from.

There only if the server was asked for trees, and for holders of its API key.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_treespec.config import METHOD
from vllm_treespec.integration.metrics import TreeProm

logger = logging.getLogger(f"vllm.{__name__}")


class TreeEndpoints:
    """vLLM's ``EndpointPlugin``."""

    name = "treespec"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        args = app.state.args
        method = (args.speculative_config or {}).get("method", args.spec_method)
        if method == METHOD:
            app.add_api_route("/treespec/clear", clear, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """The route asks the client that vLLM keeps in the state."""


async def clear(request: Request) -> Response:
    """Has every worker of every engine forget; what requests that go on have said so
    far is learned anew."""
    _authenticate(request)
    client = request.app.state.engine_client
    await client.collective_rpc("treespec_clear")
    loggers = getattr(client.logger_manager, "stat_loggers", ())  # None without stats
    for each in loggers:
        if isinstance(prom := getattr(each, "spec_decoding_prom", None), TreeProm):
            prom.forget()
    logger.info("treespec: proposers have forgotten what they learned, as asked")
    return Response(status_code=200)


def _authenticate(request: Request) -> None:
    """vLLM asks for its key on paths of its own only."""
    given = request.app.state.args.api_key or [envs.VLLM_API_KEY]
    keys = [key for key in given if key]
    if keys and not AuthenticationMiddleware(None, keys).verify_token(request.headers):
        raise HTTPException(401, "Unauthorized")
