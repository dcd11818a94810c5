"""Which batches of decoding requests vLLM captures whole CUDA graphs for.

vLLM combines each of its capture sizes with every number of drafts in the schedule. Most
of those batches never occur, some that occur are larger than any size, and a step
without drafts has a graph only if the schedule says so for some batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
)

from vllm_treespec.core.schedule import graphed_batches
from vllm_treespec.integration.engine_args import from_vllm_config
from vllm_treespec.integration.sizing import tiers

logger = logging.getLogger(f"vllm.{__name__}")

# vLLM captures up to this many rows by default. Who lowered that gets no larger graphs.
DEFAULT_MAX_ROWS = 512
# A step with more rows takes longer than launching its kernels one by one.
MAX_ROWS = 1024


def choose_decode_graphs(manager: CudaGraphManager, vllm_config: VllmConfig) -> None:
    """Replace the manager's choice; before it captures."""
    mode = manager.cudagraph_mode
    if not (
        manager.needs_capture()
        and mode.separate_routine()
        and mode.decode_mode() == CUDAGraphMode.FULL
    ):
        return
    others = manager._capture_descs.get(CUDAGraphMode.PIECEWISE, [])
    max_num_rows = _max_num_rows(vllm_config)
    batches = sorted(set(_batches(vllm_config, max_num_rows)))
    decodes = [
        BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.FULL,
            num_tokens=num_reqs * num_rows,
            num_reqs=num_reqs,
            uniform_token_count=num_rows,
            num_active_loras=num_loras,
        )
        for num_rows, num_reqs in batches
        for num_loras in manager.lora_capture_cases
    ]
    manager._capture_descs = {
        each: sorted(descs, key=lambda desc: desc.num_tokens, reverse=True)
        for each, descs in (
            (CUDAGraphMode.FULL, decodes),
            (CUDAGraphMode.PIECEWISE, others),
        )
        if descs
    }
    manager._candidates = _candidates([*decodes, *others])
    logger.info(
        "treespec: %d CUDA graphs for batches of decoding requests of up to %d rows",
        len(decodes),
        max(desc.num_tokens for desc in decodes),
    )


def _batches(
    vllm_config: VllmConfig, max_num_rows: int
) -> Iterator[tuple[int, int]]:  # rows of each request, requests
    max_num_reqs = vllm_config.scheduler_config.max_num_seqs
    # Without drafts, what vLLM would capture without speculation.
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes
    for num_reqs in {*sizes, max_num_reqs}:
        if num_reqs <= min(max_num_reqs, max_num_rows):
            yield 1, num_reqs
    for first, last, num_nodes in tiers(vllm_config):
        most = min(last, max_num_rows // (num_nodes + 1))
        for num_reqs in graphed_batches(first, most):
            yield num_nodes + 1, num_reqs
        if most < last:
            logger.warning(
                "treespec: batches of %d to %d requests with %d nodes each run without "
                "whole CUDA graphs, which end at %d rows",
                max(first, most + 1),
                last,
                num_nodes,
                max_num_rows,
            )


def _max_num_rows(vllm_config: VllmConfig) -> int:
    limit = int(vllm_config.compilation_config.max_cudagraph_capture_size)
    if limit >= DEFAULT_MAX_ROWS:
        shared = from_vllm_config(vllm_config).num_shared_rows
        limit = max(limit, min(shared, MAX_ROWS))
    return min(limit, int(vllm_config.scheduler_config.max_num_batched_tokens))


def _candidates(
    descs: list[BatchExecutionDescriptor],
) -> dict[tuple[int, int], list[BatchExecutionDescriptor]]:
    """By (tokens, LoRAs): the smallest graph of each kind that has room, whole graphs
    first, as ``CudaGraphManager.dispatch`` tries them."""
    found: dict[tuple[int, int], list[BatchExecutionDescriptor]] = {}
    room: dict[Any, int] = {}  # kind -> tokens of its last graph
    for desc in sorted(
        descs, key=lambda each: (each.num_reqs is None, each.num_tokens)
    ):
        kind = desc.cg_mode, desc.uniform_token_count, desc.num_active_loras
        for num_tokens in range(room.get(kind, -1) + 1, desc.num_tokens + 1):
            found.setdefault((num_tokens, desc.num_active_loras), []).append(desc)
        room[kind] = desc.num_tokens
    return found
