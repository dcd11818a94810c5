"""What ``rate_candidates`` and ``tally_candidates`` make of a score."""

from typing import NamedTuple

import torch

from vllm_treespec.kernels.bins import NUM_COMPANIES
from vllm_treespec.kernels.mixing import MAX_LOG_ODDS


class Voices(NamedTuple):
    """What is said of some children. All ``[num_proposers, num_rows, num_nodes]``."""

    odds: torch.Tensor  # float32, finite
    voices: torch.Tensor  # int64, as which of its voices a proposer would say it
    speaks: torch.Tensor  # bool


def log_odds(log_probs: torch.Tensor) -> torch.Tensor:
    """As ``log_probs``, which are at most 0; finite but for NaN."""
    odds = log_probs - (-log_probs.expm1()).log()
    return odds.clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS)


def listen(
    parents: torch.Tensor,  # [num_rows, num_nodes] int32, -1: root
    bits: torch.Tensor,  # [num_rows, num_nodes] int32, bit per proposer of a node
    own_scores: torch.Tensor,  # [num_proposers, num_rows, num_nodes] float32
    sibling_bits: torch.Tensor,  # as bits, of all children of a node's parent
) -> Voices:
    """What every proposer says of each node, given the node's parent."""
    own = 1 << torch.arange(len(own_scores), device=bits.device, dtype=bits.dtype)
    others = ~own[:, None, None]
    others_offer = (sibling_bits & others != 0).long()
    companies = torch.where(bits & others != 0, 2, others_offer)
    proposers = torch.arange(len(own_scores), device=bits.device)[:, None, None]
    edges = own_scores - of_parents(own_scores, parents, at_root=0.0)
    speaks = edges.isfinite()
    return Voices(
        log_odds(torch.where(speaks, edges.clamp(max=0.0), 0.0)),
        proposers * NUM_COMPANIES + companies,
        speaks,
    )


def mix(
    said: Voices,
    slopes: torch.Tensor,  # [num_voices] float32
    offsets: torch.Tensor,  # [num_voices] float32
) -> torch.Tensor:  # [num_rows, num_nodes] float32, NaN: nobody speaks
    """The mean of the corrected odds."""
    corrected = slopes[said.voices] * said.odds + offsets[said.voices]
    return torch.where(said.speaks, corrected, 0.0).sum(0) / said.speaks.sum(0)


def of_parents(
    values: torch.Tensor,  # [..., num_rows, num_nodes]
    parents: torch.Tensor,  # [num_rows, num_nodes] int32, -1: root
    at_root: float,
) -> torch.Tensor:
    """As ``values``, of every node's parent."""
    sources = parents.clamp(min=0).long().expand(values.shape)
    return torch.where(parents < 0, at_root, values.gather(-1, sources))
