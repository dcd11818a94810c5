"""From configuration to proposers."""

from __future__ import annotations

import torch

from vllm_treespec.config import (
    DeviceConfig,
    HostedConfig,
    SuffixConfig,
    TreeSpecConfig,
)
from vllm_treespec.core.propose import Proposer
from vllm_treespec.core.propose.sequoia import TYPICAL_ACCEPTANCE, optimal_template
from vllm_treespec.core.propose.shapes import BestFirst, FixedShape, Shape
from vllm_treespec.core.propose.template import TreeTemplate


def make_proposers(config: TreeSpecConfig, *, max_num_reqs: int) -> list[Proposer]:
    """One per entry of ``tree.proposers`` that drafts on the host, in that order."""
    return [
        _make(each, max_num_reqs, config.max_candidates)
        for each in config.hosted_proposers
    ]


def make_shape(
    config: DeviceConfig,
    max_nodes: int,
    device: torch.device,
    num_drawn: int = 0,
) -> Shape:
    """How a model grows trees of which ``max_nodes`` nodes are verified.

    Args:
        num_drawn: nodes of a tree whose children are drawn, 0 if none ever is.
    """
    if config.shape == "static":
        return FixedShape(TreeTemplate.from_branching(config.branching), device)
    if config.shape == "sequoia":
        template = optimal_template(config.acceptance, max_nodes, config.depth)
        return FixedShape(template, device)
    return BestFirst(
        depth=config.depth,
        width=config.width,
        num_children=config.top_k,
        device=device,
        drawn=optimal_template(TYPICAL_ACCEPTANCE, num_drawn, config.depth)
        if num_drawn
        else None,
    )


def _make(config: HostedConfig, max_num_reqs: int, max_nodes: int) -> Proposer:
    # Imported on use: Numba compiles on import, and ngram does not need suffix.
    if isinstance(config, SuffixConfig):
        from vllm_treespec.core.propose.suffix import SuffixProposer

        return SuffixProposer(
            max_num_reqs=max_num_reqs,
            max_nodes=max_nodes,
            max_depth=config.depth,
            max_cached_tokens=config.max_cached_tokens,
            min_log_prob=config.min_log_prob,
        )
    from vllm_treespec.core.propose.ngram import NgramProposer

    return NgramProposer(
        max_nodes=max_nodes,
        max_depth=config.depth,
        min_n=config.min_n,
        max_n=config.max_n,
    )
