"""python benchmarks/report_kernels.py > benchmarks/results/kernels.md

What every kernel takes of a GPU, from the compiler, and what tree attention can take at
least, from data sheets. Nothing here is measured, so no GPU is needed.
"""

from typing import NamedTuple

import torch

from vllm_treespec.kernels.attention_plan import (
    SplitBuffers,
    TileSizes,
    choose_tiles,
    table,
)
from vllm_treespec.testing.bench import print_table
from vllm_treespec.testing.kernel_variants import SIGNATURES, SPLIT, attention_of
from vllm_treespec.testing.offline_compile import compile_for
from vllm_treespec.testing.roofline import (
    A100,
    H200,
    LLAMA_8B,
    LLAMA_70B_TP8,
    Device,
    Heads,
    attention_work,
)

HEADER = """# Kernels, as compiled

```
python benchmarks/report_kernels.py > benchmarks/results/kernels.md
```

Nothing here is measured. The first tables are compile reports: registers and stack of a
thread (a stack of 0 means that nothing was spilled), shared memory of a program, and how
many programs run at once on a multiprocessor. The last ones are a model of one layer's
tree attention: the bytes that have to move at least once, divided by the memory bandwidth
of the data sheet, or the FLOPs divided by its peak where that is longer (`least_us`).
`intensity` is in FLOPs per byte; below {h200:.0f} on an H200 and {a100:.0f} on an A100
bandwidth is the bound. `l2_reads` is how often tiles of the same request read the same
keys, from the cache of the chip as a rule. `programs` share the work evenly; `fill` is the
share of the chip's program slots that they take, far below 1 the time of the model is out
of reach. `whole_fill` is what it would be if no tile of rows were cut. `merged_mib` is
what the programs write and read again at most, from the cache of the chip as a rule.

33 rows of a group of 4 are 132, 4 more than the largest tile holds, so they read the keys
twice; 32 (`num_speculative_tokens` 31) read them once."""


class Variant(NamedTuple):
    kernel: str
    variant: str
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    programs_per_sm: int


class Tiles(NamedTuple):
    head_size: int
    cache_bytes: int
    rows: int
    keys: int
    stages: int
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    tiles_ahead: int
    programs_per_sm: int


class Bound(NamedTuple):
    reqs: int
    nodes: int
    context: int
    mib: float
    gflop: float
    intensity: float
    least_us: float
    l2_reads: int
    programs: int
    fill: float
    whole_fill: float
    merged_mib: float


def variants(arch: int) -> list[Variant]:
    rows = []
    for name, arguments in SIGNATURES.items():
        if arch < 89 and "e4m3" in name:
            continue  # not in this chip
        kernel, _, variant = name.split(":")[1].partition(" ")
        compiled = compile_for(arch, name, arguments)
        rows.append(
            Variant(
                kernel.strip("_").removesuffix("_kernel"),
                variant,
                *compiled[:4],
                compiled.programs_per_sm(arch),
            )
        )
    return rows


def tuned(arch: int) -> list[Tiles]:
    rows = []
    for (tuned_arch, head_size, cache_bytes), found in sorted(table().items()):
        if tuned_arch != arch:
            continue
        quantized = "fp8e4nv" if arch >= 89 else "fp8e5"
        for tiles in found:
            tiles = choose_tiles([tiles], tiles.block_m, 4)
            arguments = attention_of(
                tiles, "bf16", 4, head_size, quantized if cache_bytes == 1 else None
            )
            compiled = compile_for(
                arch, "tree_attention:_tree_attention_kernel", arguments | SPLIT
            )
            rows.append(
                Tiles(
                    head_size,
                    cache_bytes,
                    tiles.block_m,
                    tiles.block_n,
                    tiles.num_stages,
                    *compiled,
                    compiled.programs_per_sm(arch),
                )
            )
    return rows


def bound(
    device: Device, heads: Heads, num_reqs: int, num_nodes: int, context: int
) -> Bound:
    work = attention_work(heads, num_reqs, num_nodes, context)
    tiles: TileSizes = choose_tiles(
        table()[device.arch, heads.head_size, 2], num_nodes * heads.group, heads.group
    )
    # On no device, so without the memory.
    split = SplitBuffers.of(device.num_sms, torch.device("meta"))
    most = split.num_programs(tiles)
    tiles_per_req = -(-num_nodes // tiles.block_q)
    whole = num_reqs * tiles_per_req * heads.num_kv_heads
    units = whole * -(-(context + num_nodes) // tiles.block_n)
    share = max(-(-units // most), split.min_keys // tiles.block_n)
    programs = -(-units // share)
    slots = device.num_sms * tiles.programs_per_sm
    result_bytes = tiles.block_m * (tiles.head_size_padded + 2) * 4
    return Bound(
        num_reqs,
        num_nodes,
        context,
        work.num_bytes / 2**20,
        work.num_flops / 1e9,
        work.intensity,
        work.least_us(device),
        tiles_per_req,
        programs,
        programs / slots,
        min(1.0, whole / slots),
        programs * 2 * 2 * result_bytes / 2**20,
    )


if __name__ == "__main__":
    balance = {
        device.name: device.flops_per_second / device.bytes_per_second
        for device in (H200, A100)
    }
    print(HEADER.format(h200=balance["H200"], a100=balance["A100 80GB"]))
    for arch in (80, 90):
        print_table(f"All kernels for sm_{arch}", variants(arch))
        print_table(f"Tiles of tree attention, bfloat16, sm_{arch}", tuned(arch))
    sizes = [
        (reqs, nodes, context)
        for reqs in (1, 8, 64)
        for nodes in (8, 32, 128)
        for context in (512, 4096, 32768)
    ]
    for heads in (LLAMA_8B, LLAMA_70B_TP8):
        for device in (H200, A100):
            print_table(
                f"Tree attention of one layer, {heads.name}, {device.name}",
                [bound(device, heads, *size) for size in sizes],
            )
