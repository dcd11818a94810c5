"""Verify by traversal: whole paths are accepted, from the leaves to the root.

Walking down, a child that the target likes more than the draft counts as certain, and
what it had to spare is forgotten. Here a path keeps the product of its ratios,
r(child) = min(1, r(node) p / q), and its leaf is accepted with all of it. A leaf that is
turned down is removed: its parent goes on with p <- [r p - q]+ and q without the token,
both normalised, and with r <- S / (S + 1 - r), where S is the mass of [r p - q]+; its
next child is tried, and with none left it is a leaf itself. The root has r = 1. The
token behind the accepted node comes from that node's current p.
(arXiv:2505.12398, for siblings drawn without replacement.)

A fixed child that carries this token starts over with r = 1, as the root of the draws
below it: they are independent of everything that happened so far.
"""

from __future__ import annotations

import torch

from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.draws import Draws, walk_drawn
from vllm_treespec.core.verify.target_walk import AcceptedPaths


def walk_traversal(
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
        kernels.walk_traversal,
        trees,
        draws,
        paths,
        slots,
        cu_num_logits,
        target_logits,
        positions,
    )
