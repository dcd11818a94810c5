"""python benchmarks/tune_tree_attention.py

Measures tiles of tree attention on this GPU and writes the best of this compute
capability into kernels/tuned/tree_attention.json, beside those of the others. With these
tiles it measures where FlashAttention had better attend to the keys of earlier steps, and
writes that as well. Without a GPU it checks a few tiles and the division of keys on a tiny
batch in Triton's interpreter and writes nothing.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    import treespec_cpu_host

    treespec_cpu_host.repair_interpreter()

from attention_apart import attend_apart, kind_of_layer
from triton import OutOfResources

from vllm_treespec.kernels.attention_plan import (
    TABLE,
    SplitBuffers,
    TileSizes,
    table,
    tile_sizes,
)
from vllm_treespec.kernels.reference.tree_attention import tree_attention as reference
from vllm_treespec.kernels.tree_attention import tree_attention
from vllm_treespec.testing.bench import machine, median_us, print_table
from vllm_treespec.testing.divisions import Division, regions
from vllm_treespec.testing.tile_table import write_table
from vllm_treespec.testing.trees import chain_parents

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
GROUP, NUM_KV_HEADS, BLOCK_SIZE = 4, 8 if ON_GPU else 1, 16
HEAD_SIZES = (64, 128, 256) if ON_GPU else (32,)
BLOCK_MS = (16, 32, 64, 128) if ON_GPU else (16, 32)
BLOCK_NS = (32, 64, 128) if ON_GPU else (16, 32)
NUM_STAGES = (2, 3, 4) if ON_GPU else (2,)
NUM_WARPS = (4, 8) if ON_GPU else (4,)
PROGRAMS_PER_SM = (1, 2, 4) if ON_GPU else (2,)
# (requests, context): a tile has to serve both, so their geometric mean counts
BATCHES = ((1, 16384), (16, 2048)) if ON_GPU else ((1, 300),)
# Of divided keys: rows and contexts of a request, and batches that have to gain.
ROWS = (32, 64, 128, 256) if ON_GPU else (16,)
CONTEXTS = (1024, 4096, 16384, 65536) if ON_GPU else (100,)
BATCH_SIZES = (1, 16) if ON_GPU else (2,)


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


def divide(head_size: int, rows: int, context: int, split: SplitBuffers) -> Division:
    """FlashAttention over the context and our kernel over the rest, or ours alone."""
    ratios = []
    for num_reqs in BATCH_SIZES:
        batch = make_batch(head_size, 2, rows // GROUP, num_reqs, context)
        heads = kind_of_layer(NUM_KV_HEADS * GROUP, NUM_KV_HEADS, head_size)
        outputs = [torch.zeros_like(batch["query"]) for _ in range(2)]
        together = partial(tree_attention, **batch, output=outputs[0], split=split)
        divided = attend_apart(heads, batch, BLOCK_SIZE)
        apart = partial(divided, **batch, output=outputs[1])
        apart(), together()
        tolerance = 2e-2 if ON_GPU else 1e-5
        torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
        ratios.append(median_us(apart) / median_us(together))
    return Division(head_size, rows, context, max(ratios))


def arch() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def write(name: str, measured: list[dict[str, int]]) -> None:
    """Replace this compute capability's entries."""
    stored = json.loads(TABLE.read_text())
    kept = [entry for entry in stored[name] if entry["arch"] != arch()]
    stored[name] = kept + [{"arch": arch(), **entry} for entry in measured]
    about = f" {name.capitalize()} of {arch()} were measured: {machine()}."
    about = stored.pop("about").replace(about, "") + about
    write_table(about, stored)


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
        write("tiles", tiles_of(rows))
        # What follows is measured with these tiles.
        table.cache_clear()
        tile_sizes.cache_clear()
    divisions = [divide(*size, split) for size in product(HEAD_SIZES, ROWS, CONTEXTS)]
    if ON_GPU:
        print_table("FlashAttention over the context, ours over the rest", divisions)
        write("apart", regions(divisions))
    else:
        print(
            f"{len(rows)} sizes are right with every tile in Triton's interpreter, and "
            f"so are {len(divisions)} divisions of the keys; speed is unmeasured and "
            "nothing was written, for there is no CUDA device here"
        )


if __name__ == "__main__":
    main()
