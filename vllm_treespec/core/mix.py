"""Mix: how likely is a child, given what several proposers say of it?

Every proposer states log-odds that the target goes from a node to this child. The
answer is the mean of what they say, each corrected by a slope and an offset of its own:
a draft model is too sure of itself, and what it says counts for less where others, at
the same node, say something else. So a proposer has one voice in each company. The
corrections are learned while decoding, as a logistic regression on the children whose
parents turned out right. (Logistic mixing is how PAQ combines its models; Mahoney,
"Adaptive Weighing of Context Models", 2005.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_treespec.kernels.bins import NUM_COMPANIES
from vllm_treespec.kernels.mixing import NUM_REMEMBERED

# By company, before anything is learned: about what proposers without a model end up
# with on Python of other projects, edited and not, and on logs of web servers and shops.
FIRST_SLOPES = (1.0, 0.6, 1.3)
FIRST_OFFSETS = (0.0, -1.2, 0.4)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The voices' corrections. Those of one proposer follow each other."""

    slopes: torch.Tensor  # [num_voices] float32, of log-odds, never negative
    offsets: torch.Tensor  # [num_voices] float32, nats
    memory: torch.Tensor  # [num_voices, NUM_REMEMBERED] float32, children and bends

    @classmethod
    def allocate(cls, num_proposers: int, device: torch.device) -> Mixture:
        num_voices = num_proposers * NUM_COMPANIES
        return cls(
            slopes=torch.tensor(FIRST_SLOPES * num_proposers, device=device),
            offsets=torch.tensor(FIRST_OFFSETS * num_proposers, device=device),
            memory=torch.zeros(num_voices, NUM_REMEMBERED, device=device),
        )
