"""Node budgets that follow the load, by vLLM's own schedule of drafts per batch size."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.schedule import nodes_by_batch_size

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

Schedule = list[tuple[int, int, int]]  # (first, last) batch size, nodes per request


def schedule_of(config: TreeSpecConfig) -> Schedule:
    """For batches of any size; vLLM reads it up to ``max_num_seqs``."""
    return nodes_by_batch_size(
        config.num_speculative_tokens, config.num_shared_rows, max_num_reqs=2**20
    )


def settle_schedule(vllm_config: VllmConfig, config: TreeSpecConfig) -> None:
    """Drop the schedule where every batch has room for whole trees, and say what
    applies."""
    speculative = vllm_config.speculative_config
    scheduler = vllm_config.scheduler_config
    assert speculative is not None
    max_num_reqs, nodes = scheduler.max_num_seqs, config.num_speculative_tokens
    num_rows = max_num_reqs * (nodes + 1)
    if vllm_config.parallel_config.data_parallel_size > 1:
        load = "at any load: with data parallelism nodes cannot follow it"
    elif num_rows <= config.num_shared_rows:
        speculative.num_speculative_tokens_per_batch_size = None
        load = f"at any load: max_num_seqs={max_num_reqs}"
    else:
        num_rows = config.num_shared_rows
        schedule = nodes_by_batch_size(nodes, num_rows, max_num_reqs)
        each = ", ".join(f"{first}-{last}: {each}" for first, last, each in schedule)
        load = (
            f"fewer in large batches, which share {num_rows} rows of a forward pass "
            f"(tree.max_rows): {each}"
        )
    logger.info(
        "treespec: trees of %d draft nodes per request and step, from %s; %s",
        nodes,
        ", ".join(config.proposer_names),
        load,
    )
    if num_rows > scheduler.max_num_batched_tokens:
        logger.warning(
            "treespec: max_num_batched_tokens=%d is less than the %d rows that trees "
            "of a full batch may take, so some requests will wait for their turn; "
            "raise it, or lower tree.max_rows, num_speculative_tokens or max_num_seqs",
            scheduler.max_num_batched_tokens,
            num_rows,
        )


def max_num_rows(vllm_config: VllmConfig) -> int:
    """Rows of a forward pass that are sampled from, at most."""
    num_rows = max(last * (nodes + 1) for _, last, nodes in tiers(vllm_config))
    speculative = vllm_config.speculative_config
    assert speculative is not None
    if speculative.num_speculative_tokens_per_batch_size is None:
        return num_rows
    # A step's drafts are scheduled in the next one, to which newcomers may be added.
    return num_rows + int(vllm_config.scheduler_config.max_num_seqs)


def num_warm_up_rows(vllm_config: VllmConfig) -> int:
    """Rows that vLLM samples from when it warms up: whole trees for as many requests as
    have room, whatever the schedule says."""
    num_nodes = vllm_config.num_speculative_tokens
    scheduler = vllm_config.scheduler_config
    num_reqs: int = scheduler.max_num_batched_tokens // (num_nodes + 2)
    num_rows: int = (num_nodes + 1) * min(num_reqs, scheduler.max_num_seqs)
    return num_rows


def max_num_drafting(vllm_config: VllmConfig) -> int:
    """Requests that are drafted for in one step, at most."""
    return max(last for _, last, nodes in tiers(vllm_config) if nodes > 0)


def tiers(vllm_config: VllmConfig) -> Schedule:
    """The schedule, up to the largest batch."""
    speculative = vllm_config.speculative_config
    assert speculative is not None
    max_num_reqs = vllm_config.scheduler_config.max_num_seqs
    schedule = speculative.num_speculative_tokens_per_batch_size or [
        (1, max_num_reqs, speculative.num_speculative_tokens)
    ]
    return [
        (first, min(last, max_num_reqs), nodes)
        for first, last, nodes in schedule
        if first <= max_num_reqs
    ]
