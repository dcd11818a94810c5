"""What our launches compile to on a GPU that need not be there: nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.attend import BatchTrees, attach
from vllm_treespec.core.build import TreeBuilder
from vllm_treespec.core.commit import commit_paths
from vllm_treespec.core.kernel_set import KernelSet, choose_kernels
from vllm_treespec.core.observe import StepCounts, count_step
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.draws import Draws
from vllm_treespec.core.verify.recursive_rejection import walk_without_replacement
from vllm_treespec.core.verify.target_walk import AcceptedPaths, walk_target
from vllm_treespec.core.verify.traversal import walk_traversal
from vllm_treespec.kernels.attention_plan import SplitBuffers
from vllm_treespec.kernels.compact_kv import KVLayers
from vllm_treespec.kernels.tree_attention import tree_attention
from vllm_treespec.testing.offline_compile import Launch

CPU = torch.device("cpu")
NUM_SMS = 132  # of the GPU that is not there
MAX_REQS, NUM_NODES, VOCAB_SIZE = 64, 32, 128256
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16


class _Driver:
    """A GPU of which Triton asks nothing but what to compile for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU


@contextmanager
def binaries(arch: int) -> Iterator[list[Launch]]:
    """The binaries that launches inside would need, each once, in order."""
    needed: list[Launch] = []
    compiled = SimpleNamespace(
        run=lambda *args: None,
        launch_metadata=lambda *args: None,
        function=None,
        packed_metadata=None,
    )

    def compile(self, key, signature, device, constexprs, options, attrs, warmup):  # type: ignore[no-untyped-def]
        source = ASTSource(self, signature, constexprs, attrs)
        needed.append(Launch(self.fn.__name__, source, options.__dict__))
        kernels = self.device_caches[device][0]
        kernels[key] = compiled
        return compiled

    original = JITFunction._do_compile
    driver.set_active(_Driver(arch))
    JITFunction._do_compile = compile
    try:
        yield needed
    finally:
        JITFunction._do_compile = original
        driver.reset_active()


class Step:
    """One decoding step's launches of every verb, for any number of requests.

    Attends with a model's sizes, and walks by every rule.
    """

    def __init__(self, num_proposers: int) -> None:
        kernels = choose_kernels(TreeSpecConfig(kernels="triton"), CPU)
        attend = partial(tree_attention, split=SplitBuffers.of(NUM_SMS, CPU))
        self.kernels: KernelSet = replace(kernels, tree_attention=attend)
        self.trees = TreeBuffers.allocate(MAX_REQS, NUM_NODES, CPU)
        self.batch = BatchTrees.allocate(MAX_REQS, NUM_NODES, CPU)
        self.paths = AcceptedPaths.allocate(MAX_REQS, NUM_NODES, CPU)
        self.num_proposers = num_proposers
        self.draws = Draws.allocate(
            MAX_REQS, NUM_NODES, 3, VOCAB_SIZE, torch.bfloat16, CPU
        )
        self.builder = TreeBuilder(
            self.kernels,
            self.trees,
            num_proposers=num_proposers,
            max_candidates=NUM_NODES - 1 if num_proposers == 1 else 2 * NUM_NODES - 2,
        )
        shape = (8, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        self.cache = torch.empty(shape, dtype=torch.bfloat16)
        self.table = _zeros(MAX_REQS, 512)
        self.layers = KVLayers.describe([self.cache], [self.table])
        self.texts = _zeros(MAX_REQS, 4096)

    def launch(self, num_reqs: int) -> None:
        kernels, batch = self.kernels, self.batch
        slots = torch.arange(num_reqs)
        starts = torch.arange(num_reqs + 1, dtype=torch.int32) * NUM_NODES
        num_rows = num_reqs * NUM_NODES
        counts = StepCounts.allocate(num_reqs, self.num_proposers, CPU)
        ones, lens = _zeros(num_reqs) + 1, _zeros(MAX_REQS) + 50
        attach(
            kernels, self.trees, batch, slots, starts, starts, _zeros(num_rows).long()
        )
        self.attend(num_reqs, starts)
        walk_target(
            kernels,
            self.trees,
            self.paths,
            slots,
            starts,
            _zeros(num_rows).long(),
            counts.counts,
        )
        logits = torch.empty(1, VOCAB_SIZE).expand(num_rows, -1)
        for rule in (walk_without_replacement, walk_traversal):
            rule(
                kernels,
                self.trees,
                self.draws,
                self.paths,
                slots,
                starts,
                logits,
                slots,
            )
        count_step(kernels, self.trees, self.paths, slots, starts, counts)
        commit_paths(kernels, self.layers, batch, self.paths, slots)
        self.builder.learn(slots, ones, self.texts, lens)
        self.builder.build(slots, ones, lens, _zeros(MAX_REQS), num_nodes=NUM_NODES - 1)
        newest = _zeros(num_reqs, 1 + NUM_NODES)
        kernels.newest_tokens(slots, ones, self.texts, lens, newest)

    def attend(self, num_reqs: int, starts: torch.Tensor) -> None:
        query = torch.empty(
            num_reqs * NUM_NODES, NUM_HEADS, HEAD_SIZE, dtype=torch.bfloat16
        )
        self.kernels.tree_attention(
            query,
            *torch.split(self.cache, HEAD_SIZE, dim=-1),
            torch.empty_like(query),
            starts,
            _zeros(num_reqs) + 100,
            self.table[:num_reqs],
            self.batch.num_nodes,
            self.batch.depths,
            self.batch.masks,
            max_query_len=NUM_NODES,
            scale=0.1,
            sliding_window=None,
            soft_cap=None,
        )


def _zeros(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32)
