"""How a launch of tree attention is cut: tiles, and segments of the context."""

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
# Floats of scratch for each multiprocessor: 128 rows of a head of 128.
FLOATS_PER_SM = 128 * 128
MIN_HEAD_SIZE = 16  # a narrower head is padded: tl.dot needs as much
MIN_SEGMENT_KEYS = 128
MAX_SEGMENTS = 64


class TileSizes(NamedTuple):
    """What one program holds: ``BLOCK_M >= BLOCK_Q * group`` rows, BLOCK_N keys."""

    block_q: int
    block_m: int
    block_n: int
    head_size_padded: int
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that run at once


class Region(NamedTuple):
    """Launches in which FlashAttention over the keys of earlier steps, our kernel over this
    step's and a merge were measured to be faster than our kernel alone."""

    min_rows: int  # of a request, queries times group
    max_rows: int
    min_keys: int  # of the longest request

    def has(self, rows: int, num_keys: int) -> bool:
        return self.min_rows <= rows <= self.max_rows and num_keys >= self.min_keys


@dataclass(frozen=True, slots=True)
class SplitBuffers:
    """Scratch for contexts that are cut into segments, at addresses that CUDA graphs
    can keep. One serves all layers: they run one after the other.

    A row is one query head of one token in one segment. Peaks and totals are in base 2:
    the segment's softmax denominator is ``total * 2 ** peak``.
    """

    num_sms: int  # multiprocessors of the device
    weighted: torch.Tensor  # [max_num_floats] f32, softmax numerators of all rows
    peaks: torch.Tensor  # [max_num_rows] f32
    totals: torch.Tensor  # [max_num_rows] f32, 0: nothing seen, the numerator is stale

    @classmethod
    def allocate(cls, device: torch.device) -> SplitBuffers:
        """72 KiB for every multiprocessor, peaks and totals included: 9.3 MiB on an
        H200."""
        num_sms = 4  # no device to fill, but the same code
        if device.type == "cuda":
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        num_floats = num_sms * FLOATS_PER_SM

        def empty(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.float32, device=device)

        num_rows = num_floats // MIN_HEAD_SIZE
        return cls(num_sms, empty(num_floats), empty(num_rows), empty(num_rows))

    def num_segments(
        self,
        tiles: TileSizes,
        *,
        num_tokens: int,
        num_reqs: int,
        num_heads: int,
        num_kv_heads: int,
        max_query_len: int,
        max_num_keys: int,
    ) -> int:
        """Segments that fill the device, as far as the scratch goes; 1: do not split.

        Only of numbers that a CUDA graph is captured for: contexts may grow in it.
        """
        tiles_per_req = -(-max_query_len // tiles.block_q)
        num_tiles = min(
            num_reqs * tiles_per_req, num_tokens // tiles.block_q + num_reqs
        )
        num_floats = num_tokens * num_heads * tiles.head_size_padded
        return max(
            1,
            min(
                self.num_sms * tiles.programs_per_sm // (num_tiles * num_kv_heads),
                self.weighted.numel() // num_floats,
                max_num_keys // MIN_SEGMENT_KEYS,
                MAX_SEGMENTS,
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
    return default_tiles(rows, group, head_size, query_dtype.itemsize)


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


@functools.cache
def regions(device: torch.device, head_size: int) -> list[Region]:
    """The table's for this device and heads; none where nothing was measured."""
    return [
        Region(entry["min_rows"], entry["max_rows"], entry["min_keys"])
        for entry in json.loads(TABLE.read_text())["apart"]
        if (entry["arch"], entry["head_size"]) == (_arch(device), head_size)
    ]


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
    """Tiles that fit 96 KiB of shared memory, whatever the head."""
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
