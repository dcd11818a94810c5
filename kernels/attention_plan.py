"""How a launch of tree attention is cut: tiles, and how many programs share them."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton

TABLE = Path(__file__).parent / "tuned/tree_attention.json"
# Floats of scratch for each multiprocessor: two results of 256 rows of a head of 128.
FLOATS_PER_SM = 2 * 256 * 128
MAX_PROGRAMS_PER_SM = 32
# Of shared memory, at most, where three tiles of keys and values are held.
DEFAULT_TILE_BYTES = 112 * 1024
MIN_HEAD_SIZE = 16  # a narrower head is padded: tl.dot needs as much


class TileSizes(NamedTuple):
    """What one program holds: ``BLOCK_M >= BLOCK_Q * group`` rows, BLOCK_N keys."""

    block_q: int
    block_m: int
    block_n: int
    head_size_padded: int
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that run at once


@dataclass(frozen=True, slots=True)
class SplitBuffers:
    """Scratch for work that is divided evenly among programs, at addresses that CUDA
    graphs can keep. One serves all layers: they run one after the other.

    A program may go on with a tile of rows that another began, and leave one to others:
    two partial results. Peaks and totals are in base 2: the softmax denominator of what
    a program saw is ``total * 2 ** peak``.
    """

    num_sms: int  # multiprocessors of the device
    weighted: torch.Tensor  # [max_num_floats] f32, softmax numerators of all rows
    peaks: torch.Tensor  # [max_num_rows] f32
    totals: torch.Tensor  # [max_num_rows] f32, 0: nothing seen, the numerator is stale
    cuts: torch.Tensor  # [max_num_programs * 4] int32, tiles that were left to others
    min_keys: int = 256  # of a program; fewer cost less than to merge them

    @classmethod
    def allocate(cls, device: torch.device) -> SplitBuffers:
        """288 KiB for every multiprocessor: 37 MiB on an H200."""
        num_sms = 1  # a CPU's programs run one after the other
        if device.type == "cuda":
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        return cls.of(num_sms, device)

    @classmethod
    def of(cls, num_sms: int, device: torch.device, **options: int) -> SplitBuffers:
        """Those of a device of as many multiprocessors."""
        num_floats = num_sms * FLOATS_PER_SM

        def empty(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.float32, device=device)

        num_rows = num_floats // MIN_HEAD_SIZE
        cuts = torch.empty(num_sms * MAX_PROGRAMS_PER_SM * 4, device=device).int()
        return cls(
            num_sms,
            empty(num_floats),
            empty(num_rows),
            empty(num_rows),
            cuts,
            **options,
        )

    def num_programs(self, tiles: TileSizes) -> int:
        """As many as run at once, as far as the scratch goes: never of what a CUDA graph
        is replayed for."""
        floats_per_program = 2 * tiles.block_m * tiles.head_size_padded
        return max(
            1,
            min(
                self.num_sms * min(tiles.programs_per_sm, MAX_PROGRAMS_PER_SM),
                self.weighted.numel() // floats_per_program,
            ),
        )


@functools.cache
def tile_sizes(
    max_query_len: int,
    group: int,
    head_size: int,
    query_dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> TileSizes:
    """The table's tiles for this device, or the default where it has none."""
    rows = max_query_len * group
    head_size_padded = max(MIN_HEAD_SIZE, triton.next_power_of_2(head_size))
    arch = _arch(device)
    if arch is not None and query_dtype.itemsize == 2:
        found = table().get((arch, head_size_padded, cache_dtype.itemsize))
        if found is not None:
            return choose_tiles(found, rows, group)
    tiles = default_tiles(rows, group, head_size, query_dtype.itemsize)
    return tiles._replace(programs_per_sm=_programs_of_default_tiles(device))


def _programs_of_default_tiles(device: torch.device) -> int:
    """As many as fit: two on the larger chips, on which one leaves half of it idle."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    # Beside what they ask for, programs take a KiB each.
    shared: int = properties.shared_memory_per_multiprocessor
    return max(1, min(2, shared // (DEFAULT_TILE_BYTES + 1024)))


def _arch(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def table() -> dict[tuple[int, int, int], list[TileSizes]]:
    """Tiles of growing ``block_m`` by compute capability, padded head size and bytes
    of a cached number; ``block_q`` is 0."""
    found: dict[tuple[int, int, int], list[TileSizes]] = defaultdict(list)
    for entry in json.loads(TABLE.read_text())["tiles"]:
        key = entry.pop("arch"), entry["head_size_padded"], entry.pop("cache_bytes")
        found[key].append(TileSizes(block_q=0, **entry))
    for tiles in found.values():
        tiles.sort(key=lambda each: each.block_m)
    return dict(found)


def choose_tiles(found: list[TileSizes], rows: int, group: int) -> TileSizes:
    """The smallest that hold all rows of a request, else the largest."""
    fitting = [tiles for tiles in found if tiles.block_m >= max(rows, group)]
    tiles = fitting[0] if fitting else found[-1]
    # A group larger than any tile of the table.
    block_m = max(tiles.block_m, triton.next_power_of_2(group))
    return tiles._replace(block_m=block_m, block_q=block_m // group)


def default_tiles(
    rows: int, group: int, head_size: int, element_size: int
) -> TileSizes:
    """Tiles that fit the smallest chips, whatever the head."""
    head_size_padded = max(MIN_HEAD_SIZE, triton.next_power_of_2(head_size))
    # Tiles are cut to keep rows * head_size * element_size within 16 KiB.
    row_bytes = head_size_padded * element_size
    most_rows = max(16, min(64, 16384 // row_bytes))
    rows = triton.next_power_of_2(rows)
    block_m = max(16, triton.next_power_of_2(group), min(most_rows, rows))
    return TileSizes(
        block_q=block_m // group,
        block_m=block_m,
        block_n=most_rows,
        head_size_padded=head_size_padded,
        num_warps=4,
        num_stages=3,
        programs_per_sm=1,
    )
