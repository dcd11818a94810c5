"""What skipping sub-layers is worth: fewer accepted tokens for a cheaper draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_treespec.config import SkipSet


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Seconds of the parts of one forward."""

    attention: tuple[float, ...]  # [num_layers]
    mlp: tuple[float, ...]  # [num_layers]
    other: float  # embeddings, norms, the vocabulary

    def ratio(self, skip: SkipSet) -> float:
        """Time of a forward that skips these, of one that does not."""
        full = sum(self.attention) + sum(self.mlp) + self.other
        skipped = sum(self.attention[layer] for layer in skip.attention)
        skipped += sum(self.mlp[layer] for layer in skip.mlp)
        return 1 - skipped / full


def best_depth(
    accepted_at: Sequence[float],  # [max_depth], share of steps that accept as many
    ratio: float,
) -> tuple[int, float]:
    """The depth of drafts at which speculation gains most, and the speed-up.

    Tokens per step over its time in forwards of the target: one verifies, and each
    level of the draft takes its ratio of one (Leviathan et al., arXiv:2211.17192, with
    measured acceptance in place of a rate). Verifying a tree counts as one forward,
    as it does while the weights' traffic is what takes the time.
    """
    tokens, gains = 1.0, []
    for depth, accepted in enumerate(accepted_at, start=1):
        tokens += accepted
        gains.append((tokens / (1 + depth * ratio), depth))
    speedup, depth = max(gains)
    return depth, speedup
