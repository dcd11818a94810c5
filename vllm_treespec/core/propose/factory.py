"""From configuration to proposers."""

from __future__ import annotations

from vllm_treespec.config import NgramConfig, SuffixConfig, TreeSpecConfig
from vllm_treespec.core.propose import Proposer


def make_proposers(config: TreeSpecConfig, *, max_num_reqs: int) -> list[Proposer]:
    """One proposer per entry of ``tree.proposers``, in that order."""
    return [
        _make(each, max_num_reqs, config.num_speculative_tokens)
        for each in config.proposers
    ]


def _make(
    config: SuffixConfig | NgramConfig, max_num_reqs: int, max_nodes: int
) -> Proposer:
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
