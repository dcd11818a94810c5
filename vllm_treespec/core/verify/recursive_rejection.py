"""Verify by recursive rejection: siblings drawn without replacement.

A drawn child with token t is accepted with probability min(1, p(t) / q(t)). Turning it
down leaves the target with what the draft did not cover, p <- [p - q]+, and the draft
with what it has not drawn yet, q without t, both normalised; the next sibling was
drawn from just that q, so the step repeats. No sibling is wasted on a token that was
turned down before: with enough of them, everything the draft can say is covered.
(RSD, arXiv:2402.14160; Sequoia, arXiv:2402.12374.)
"""

from __future__ import annotations

import torch

from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.draws import Draws, walk_drawn
from vllm_treespec.core.verify.target_walk import AcceptedPaths


def walk_without_replacement(
    kernels: KernelSet,
    trees: TreeBuffers,
    draws: Draws,
    paths: AcceptedPaths,  # written, rows in batch order
    slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32
    target_logits: torch.Tensor,  # [num_logits, vocab_size] float32, processed
    positions: torch.Tensor,  # [num_reqs] int64, of every row's root
) -> tuple[torch.Tensor, torch.Tensor]:
    """Emitted tokens and their count, as ``walk_target`` returns them."""
    return walk_drawn(
        kernels.walk_without_replacement,
        trees,
        draws,
        paths,
        slots,
        cu_num_logits,
        target_logits,
        positions,
    )
