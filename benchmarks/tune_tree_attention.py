"""python benchmarks/tune_tree_attention.py

Measures tiles of tree attention on this GPU and writes the best of this compute
capability into kernels/tuned/tree_attention.json, beside those of the others. Without a
GPU it checks a few tiles on a tiny batch in Triton's interpreter and writes nothing.
"""

import json
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    import treespec_cpu_host

    treespec_cpu_host.repair_interpreter()

from triton import OutOfResources

from vllm_treespec.kernels.attention_plan import TABLE, SplitBuffers, TileSizes
from vllm_treespec.kernels.reference.tree_attention import tree_attention as reference
from vllm_treespec.kernels.tree_attention import tree_attention
from vllm_treespec.testing.bench import machine, median_us, print_table
from vllm_treespec.testing.tile_table import write_table
from vllm_treespec.testing.trees import chain_parents

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
GROUP, NUM_KV_HEADS, BLOCK_SIZE = 4, 8 if ON_GPU else 1, 16
HEAD_SIZES = (64, 128, 256) if ON_GPU else (32,)
BLOCK_MS = (16, 32, 64, 128) if ON_GPU else (16, 32)
BLOCK_NS = (32, 64, 128) if ON_GPU else (16, 32)
NUM_STAGES = (2, 3, 4, 5) if ON_GPU else (2,)
NUM_WARPS = (4, 8) if ON_GPU else (4,)
PROGRAMS_PER_SM = (1, 2, 4) if ON_GPU else (2,)
# (requests, context): a tile has to serve both, so their geometric mean counts
BATCHES = ((1, 16384), (16, 2048)) if ON_GPU else ((1, 300),)


class Row(NamedTuple):
    head_size: int
    cache_bytes: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    mean_us: float


def make_batch(
    head_size: int, cache_bytes: int, num_nodes: int, num_reqs: int, context: int
) -> dict[str, Any]:
    seq_len = context + num_nodes
    num_blocks = -(-seq_len // BLOCK_SIZE)
    shape = (num_reqs * num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * head_size)
    cache = torch.randn(shape, device=DEVICE).to(DTYPE)
    options: dict[str, Any] = {}
    if cache_bytes == 1:
        cache = cache.to(torch.float8_e4m3fn)
        one = torch.ones(1, device=DEVICE)
        options = {"key_scale": one, "value_scale": one}
    num_tokens, num_heads = num_reqs * num_nodes, NUM_KV_HEADS * GROUP
    query = torch.randn(num_tokens, num_heads, head_size, device=DEVICE).to(DTYPE)
    # A chain's masks cost what any tree's do.
    depths = chain_parents(num_reqs, num_nodes) + 1
    seen = torch.ones(num_nodes, -(-num_nodes // 32) * 32, dtype=torch.long).tril()
    masks = (seen.unflatten(1, (-1, 32)) << torch.arange(32)).sum(2).int()
    table = torch.randperm(num_reqs * num_blocks).view(num_reqs, -1).int()
    key_cache, value_cache = cache.split(head_size, dim=3)
    return {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "query_start_loc": torch.arange(num_reqs + 1).int().to(DEVICE) * num_nodes,
        "seq_lens": torch.full((num_reqs,), seq_len, device=DEVICE).int(),
        "block_table": table.to(DEVICE),
        "num_nodes": torch.full((num_reqs,), num_nodes, device=DEVICE).int(),
        "depths": depths.to(DEVICE),
        "masks": masks.repeat(num_reqs, 1, 1).to(DEVICE),
        "max_query_len": num_nodes,
        "scale": head_size**-0.5,
        "sliding_window": None,
        "soft_cap": None,
        **options,
    }


def candidates(head_size: int, block_m: int) -> Iterator[TileSizes]:
    for block_n in BLOCK_NS:
        for num_warps in NUM_WARPS:
            for num_stages in NUM_STAGES:
                for programs_per_sm in PROGRAMS_PER_SM:
                    yield TileSizes(
                        block_q=block_m // GROUP,
                        block_m=block_m,
                        block_n=block_n,
                        head_size_padded=head_size,
                        num_warps=num_warps,
                        num_stages=num_stages,
                        programs_per_sm=programs_per_sm,
                    )


def measure(
    batch: dict[str, Any], split: SplitBuffers, expected: torch.Tensor, tiles: TileSizes
) -> float:
    output = torch.zeros_like(expected)

    def attend() -> None:
        tree_attention(**batch, output=output, split=split, tiles=tiles)

    try:
        attend()
    except OutOfResources:
        return float("inf")
    tolerance = 2e-2 if ON_GPU else 1e-5
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    return median_us(attend)


def best(head_size: int, cache_bytes: int, block_m: int, split: SplitBuffers) -> Row:
    num_nodes = block_m // GROUP + 1 if block_m == BLOCK_MS[-1] else block_m // GROUP
    batches = [make_batch(head_size, cache_bytes, num_nodes, *size) for size in BATCHES]
    expected = [torch.zeros_like(batch["query"]) for batch in batches]
    for batch, output in zip(batches, expected, strict=True):
        reference(**batch, output=output)
    rows = []
    for tiles in candidates(head_size, block_m):
        times = [
            measure(batch, split, output, tiles)
            for batch, output in zip(batches, expected, strict=True)
        ]
        mean_us = statistics.geometric_mean(times)
        rows.append(
            Row(head_size, cache_bytes, block_m, *tiles[2:3], *tiles[4:], mean_us)
        )
    return min(rows, key=lambda row: row.mean_us)


def arch() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def write(measured: list[dict[str, int]]) -> None:
    """Replace this compute capability's entries."""
    stored = json.loads(TABLE.read_text())
    kept = [each for each in stored["tiles"] if each["arch"] != arch()]
    about = f" Tiles of {arch()} were measured: {machine()}."
    write_table(
        stored["about"].replace(about, "") + about,
        kept + [{"arch": arch(), **each} for each in measured],
    )


def tiles_of(rows: list[Row]) -> list[dict[str, int]]:
    return [
        {
            "cache_bytes": row.cache_bytes,
            "block_m": row.block_m,
            "block_n": row.block_n,
            "head_size_padded": row.head_size,
            "num_warps": row.num_warps,
            "num_stages": row.num_stages,
            "programs_per_sm": row.programs_per_sm,
        }
        for row in rows
    ]


def main() -> None:
    split = SplitBuffers.allocate(DEVICE)
    can_quantize = not ON_GPU or torch.cuda.get_device_capability() >= (8, 9)
    rows = [
        best(head_size, cache_bytes, block_m, split)
        for head_size in HEAD_SIZES
        for cache_bytes in ((2, 1) if can_quantize else (2,))
        for block_m in BLOCK_MS
    ]
    if ON_GPU:
        print_table("The fastest tiles of tree attention", rows)
        write(tiles_of(rows))
    else:
        print(
            f"{len(rows)} sizes are right with every tile in Triton's interpreter; speed "
            "is unmeasured and nothing was written, for there is no CUDA device here"
        )


if __name__ == "__main__":
    main()
