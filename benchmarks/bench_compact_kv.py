"""python benchmarks/bench_compact_kv.py"""

import sys
from typing import NamedTuple

import torch

from vllm_treespec.kernels.compact_kv import KVLayers, compact_kv
from vllm_treespec.kernels.reference.compact_kv import compact_kv as reference
from vllm_treespec.testing.bench import median_us, print_table

NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
NUM_BLOCKS = 8  # of each request


class Row(NamedTuple):
    reqs: int
    nodes: int
    accepted: int
    triton_us: float
    torch_us: float


def measure(num_reqs: int, num_nodes: int, accepted: int) -> Row:
    # The longest moves there are: the path is the last nodes of the tree.
    path = torch.arange(num_nodes - accepted, num_nodes)
    paths = torch.cat([torch.zeros(1, dtype=torch.long), path]).repeat(num_reqs, 1)
    batch = (
        torch.randperm(num_reqs).int().cuda(),
        torch.randint(BLOCK_SIZE, (num_reqs,)).int().cuda(),
        paths.int().cuda(),
        torch.full((num_reqs,), accepted).int().cuda(),
    )
    block_table = torch.randperm(num_reqs * NUM_BLOCKS).view(num_reqs, -1).int().cuda()
    shape = (num_reqs * NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    caches = [
        torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        for _ in range(NUM_LAYERS)
    ]
    copies = [cache.clone() for cache in caches]
    layers = KVLayers.describe(caches, [block_table] * NUM_LAYERS)
    expected = KVLayers.describe(copies, [block_table] * NUM_LAYERS)
    compact_kv(layers, *batch)
    reference(expected, *batch)
    assert all(map(torch.equal, caches, copies)), "wrong, not fast"
    return Row(
        num_reqs,
        num_nodes,
        accepted,
        median_us(lambda: compact_kv(layers, *batch)),
        median_us(lambda: reference(expected, *batch)),
    )


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("compact_kv is timed on a CUDA device, and there is none here")
    sizes = [
        (reqs, nodes, accepted)
        for reqs in (1, 16, 64)
        for nodes, accepted in ((16, 0), (16, 4), (64, 6), (64, 40))
    ]
    heads = f"{NUM_LAYERS} layers, {NUM_KV_HEADS} KV heads, size {HEAD_SIZE}, bfloat16"
    print_table(f"compact_kv, {heads}", [measure(*size) for size in sizes])
