"""The heavy part of every verb, as one choice made at construction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.kernels.attention_plan import SplitBuffers


@dataclass(frozen=True, slots=True)
class KernelSet:
    """Functions of one signature, either Triton kernels or their torch twins."""

    tree_attention: Callable[..., None]
    ancestor_mask: Callable[..., None]
    gather_trees: Callable[..., None]
    penalize_paths: Callable[..., None]
    ban_words: Callable[..., None]
    walk_tree: Callable[..., None]
    walk_without_replacement: Callable[..., None]
    walk_iid: Callable[..., None]
    walk_traversal: Callable[..., None]
    compact_kv: Callable[..., None]
    count_step: Callable[..., None]
    tally_candidates: Callable[..., None]
    learn_mixture: Callable[..., None]
    merge_candidates: Callable[..., None]
    rate_candidates: Callable[..., None]
    select_nodes: Callable[..., None]
    perturb_logits: Callable[..., None]
    newest_tokens: Callable[..., None]


def choose_kernels(config: TreeSpecConfig, device: torch.device) -> KernelSet:
    """Triton on a GPU. On a CPU it would be interpreted, so the twins are faster."""
    on_gpu = device.type != "cpu"
    wants_triton = config.kernels == "triton" or (config.kernels == "auto" and on_gpu)
    package = "kernels" if wants_triton else "kernels.reference"
    kernels = {name: _load(package, name) for name in KernelSet.__slots__}
    if wants_triton:
        kernels["tree_attention"] = partial(
            kernels["tree_attention"], split=SplitBuffers.allocate(device)
        )
    return KernelSet(**kernels)


def _load(package: str, name: str) -> Any:
    # Imported here, because Triton decides on import whether it interprets.
    from importlib import import_module

    return getattr(import_module(f"vllm_treespec.{package}.{name}"), name)
