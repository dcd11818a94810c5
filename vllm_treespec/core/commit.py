"""Commit: what stays in the KV cache?

A tree's keys and values lie in node order behind the root. The accepted path moves to
the front, where the next step looks for it, in every layer and before anything reads.
"""

from __future__ import annotations

import torch

from vllm_treespec.core.attend import BatchTrees
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.verify.target_walk import AcceptedPaths
from vllm_treespec.kernels.compact_kv import KVLayers


def commit_paths(
    kernels: KernelSet,
    layers: KVLayers,
    batch: BatchTrees,
    paths: AcceptedPaths,
    slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
) -> None:
    """Keep the accepted paths' KV. Enqueue it before the next forward."""
    num_reqs = slots.shape[0]
    kernels.compact_kv(
        layers,
        slots,
        batch.root_positions[:num_reqs],
        paths.nodes[:num_reqs],
        paths.lengths[:num_reqs],
    )
