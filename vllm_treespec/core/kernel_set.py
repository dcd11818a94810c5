"""The heavy part of every verb, as one choice made at construction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton

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
    read_nodes: Callable[..., None]
    read_roots: Callable[..., None]
    learn_rates: Callable[..., None]
    fit_rates: Callable[..., None]
    weigh_successors: Callable[..., None]
    blend_successors: Callable[..., None]
    grow_paths: Callable[..., None]


def choose_kernels(config: TreeSpecConfig, device: torch.device) -> KernelSet:
    """Triton where it compiles, twins where it would be interpreted.

    A CPU attends through torch's own attention, which is faster than both.
    """
    chosen = config.kernels
    if chosen == "auto":
        chosen = "triton" if _compiles(device) else "torch"
    package = "kernels" if chosen == "triton" else "kernels.reference"
    kernels = {name: _load(package, name) for name in KernelSet.__slots__}
    if config.kernels == "auto" and device.type == "cpu":
        kernels["tree_attention"] = _load("kernels", "host_attention")
    elif chosen == "triton":
        kernels["tree_attention"] = partial(
            kernels["tree_attention"], split=SplitBuffers.allocate(device)
        )
    return KernelSet(**kernels)


def _compiles(device: torch.device) -> bool:
    """Whether Triton makes machine code for it: for a CPU only with a backend."""
    if device.type != "cpu":
        return True
    return "cpu" in triton.backends.backends and not triton.knobs.runtime.interpret


def _load(package: str, name: str) -> Any:
    # Imported here, because Triton decides on import whether it interprets.
    from importlib import import_module

    return getattr(import_module(f"vllm_treespec.{package}.{name}"), name)
