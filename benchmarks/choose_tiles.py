"""python benchmarks/choose_tiles.py

Chooses the tiles of tree attention from compile reports, for GPUs that are not there,
and writes kernels/tuned/tree_attention.json. `tune_tree_attention.py` measures instead.
Takes a quarter of an hour on two cores.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import NamedTuple

from vllm_treespec.kernels.attention_plan import TileSizes
from vllm_treespec.testing.kernel_variants import SPLIT, attention_of
from vllm_treespec.testing.offline_compile import Compiled, compile_for
from vllm_treespec.testing.tile_table import write_table

ABOUT = (
    "Chosen from compile reports by benchmarks/choose_tiles.py, not measured: of the "
    "tiles that spill no register and have two more on their way while one is at work, "
    "those with the most bytes on their way up to 64 KiB per multiprocessor, then two "
    "programs at once, then 64 keys a tile rather than 32, then the most programs, then "
    "the least shared memory."
)
GROUP = 4
# Enough for the bandwidth of an H200 at a latency of a microsecond, and half as much
# again: 4.8 TB/s / 132.
BYTES_IN_FLIGHT = 64 * 1024
VARIANT = "tree_attention:_tree_attention_kernel"


class Report(NamedTuple):
    tiles: TileSizes
    compiled: Compiled
    bytes_in_flight: int  # of keys and values, on one multiprocessor


def candidates(head_size: int, block_m: int, num_warps: int) -> Iterator[TileSizes]:
    # The first that is as good as can be is taken.
    for block_n, num_stages in ((64, 3), (32, 4), (32, 3)):
        yield TileSizes(
            block_q=block_m // GROUP,
            block_m=block_m,
            block_n=block_n,
            head_size_padded=head_size,
            num_warps=num_warps,
            num_stages=num_stages,
            programs_per_sm=1,
        )


def report(arch: int, cache_bytes: int, tiles: TileSizes) -> Report | None:
    quantized = "fp8e4nv" if arch >= 90 else "fp8e5"
    arguments = attention_of(
        tiles,
        "bf16",
        GROUP,
        tiles.head_size_padded,
        cache=quantized if cache_bytes == 1 else None,
    )
    try:
        compiled = compile_for(arch, VARIANT, arguments | SPLIT)
    except ValueError:
        return None  # too much shared memory
    programs = compiled.programs_per_sm(arch)
    tile_bytes = 2 * tiles.block_n * tiles.head_size_padded * cache_bytes
    tiles = tiles._replace(programs_per_sm=programs)
    return Report(tiles, compiled, programs * compiled.tiles_ahead * tile_bytes)


def best(reports: list[Report]) -> Report | None:
    fitting = [
        each
        for each in reports
        if each.compiled.stack_bytes == 0 and each.compiled.tiles_ahead > 1
    ]
    return max(
        fitting,
        key=lambda each: (
            min(each.bytes_in_flight, BYTES_IN_FLIGHT),
            each.tiles.programs_per_sm > 1,
            min(each.tiles.block_n, 64),
            each.tiles.programs_per_sm,
            -each.compiled.shared_bytes,
        ),
        default=None,
    )


def chosen_for(
    arch: int, head_size: int, cache_bytes: int, block_m: int
) -> Report | None:
    # More warps have more registers, but wait for one another.
    for num_warps in (8,) if block_m == 128 else (4, 8):
        tried: list[Report] = []
        for tiles in candidates(head_size, block_m, num_warps):
            if (found := report(arch, cache_bytes, tiles)) is not None:
                tried.append(found)
            chosen = best(tried)
            if chosen and chosen.bytes_in_flight >= BYTES_IN_FLIGHT:
                return chosen
        if chosen := best(tried):
            return chosen
    return None


def entry(
    arch: int, head_size: int, cache_bytes: int, block_m: int
) -> dict[str, int] | None:
    chosen = chosen_for(arch, head_size, cache_bytes, block_m)
    print(arch, head_size, cache_bytes, block_m, chosen, flush=True)
    if chosen is None:
        return None
    tiles = chosen.tiles._asdict()
    del tiles["block_q"]
    return {"arch": arch, "cache_bytes": cache_bytes, **tiles}


def main() -> None:
    sizes = product((90, 80), (64, 128, 256), (2, 1), (16, 32, 64, 128))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(entry, *zip(*sizes, strict=True)))
    write_table(ABOUT, [each for each in found if each is not None])


if __name__ == "__main__":
    main()
