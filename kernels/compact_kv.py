"""Move the accepted path's keys and values to where a causal sequence keeps them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Columns of KVLayers.table; strides and row sizes count words.
CACHE_PTR = tl.constexpr(0)
BLOCK_TABLE_PTR = tl.constexpr(1)
BLOCK_TABLE_STRIDE = tl.constexpr(2)
STRIDE_BLOCK = tl.constexpr(3)
STRIDE_HEAD = tl.constexpr(4)
STRIDE_SLOT = tl.constexpr(5)
NUM_HEADS = tl.constexpr(6)
BLOCK_SIZE = tl.constexpr(7)
ROW_WORDS = tl.constexpr(8)
NUM_COLUMNS = tl.constexpr(9)

WORD_TYPES = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
MAX_TILE_WORDS = 4096  # what one program holds in registers


@dataclass(frozen=True, slots=True)
class KVLayers:
    """Where every layer keeps its KV, described once for the device.

    Layers may differ in everything but the device: rows move as words of a size that
    divides every layer's addresses, strides and rows.
    """

    caches: tuple[torch.Tensor, ...]  # kept alive: the table holds their addresses
    block_tables: tuple[torch.Tensor, ...]  # per layer, kept alive too
    table: torch.Tensor  # [num_layers, columns] int64
    max_num_heads: int
    max_row_words: int
    word_bytes: int

    @classmethod
    def describe(
        cls,
        caches: Sequence[torch.Tensor],
        # per layer [num_blocks, num_kv_heads, block_size, row_size], row: K then V
        block_tables: Sequence[torch.Tensor],
        # per layer [max_num_reqs, max_num_blocks] int32, shared within a KV group
    ) -> KVLayers:
        """A cache listed again under the same block table is one layer's, shared."""
        if not caches or len(caches) != len(block_tables):
            raise ValueError(
                f"{len(caches)} caches and {len(block_tables)} block tables: "
                "pass one of each for every layer, and at least one layer"
            )
        # Moving a shared cache twice would move rows that have already been replaced.
        layers = {
            (cache.data_ptr(), block_table.data_ptr()): (cache, block_table)
            for cache, block_table in zip(caches, block_tables, strict=True)
        }.values()
        for layer, (cache, block_table) in enumerate(layers):
            _check_layer(layer, cache, block_table)
        word_bytes = math.gcd(8, *(_granule(cache) for cache, _ in layers))
        rows = [_describe_layer(*layer, word_bytes) for layer in layers]
        return cls(
            caches=tuple(cache for cache, _ in layers),
            block_tables=tuple(block_table for _, block_table in layers),
            table=torch.tensor(rows, dtype=torch.int64, device=caches[0].device),
            max_num_heads=max(row[NUM_HEADS.value] for row in rows),
            max_row_words=max(row[ROW_WORDS.value] for row in rows),
            word_bytes=word_bytes,
        )


@triton.jit
def _compact_kv_kernel(
    layers_ptr,
    slots_ptr,
    root_positions_ptr,
    paths_ptr,
    paths_stride,
    path_lens_ptr,
    WORD: tl.constexpr,
    ROW_WORDS_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,  # path tokens moved at a time
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    layer_ptr = layers_ptr + tl.program_id(1) * NUM_COLUMNS
    path_len = tl.load(path_lens_ptr + row)
    if (path_len == 0) | (head >= tl.load(layer_ptr + NUM_HEADS)):
        return

    cache_ptr = tl.load(layer_ptr + CACHE_PTR).to(tl.pointer_type(WORD))
    block_table_ptr = tl.load(layer_ptr + BLOCK_TABLE_PTR).to(tl.pointer_type(tl.int32))
    slot = tl.load(slots_ptr + row).to(tl.int64)
    block_table_ptr += slot * tl.load(layer_ptr + BLOCK_TABLE_STRIDE)
    cache_ptr += head * tl.load(layer_ptr + STRIDE_HEAD)
    stride_block = tl.load(layer_ptr + STRIDE_BLOCK)
    stride_slot = tl.load(layer_ptr + STRIDE_SLOT)
    block_size = tl.load(layer_ptr + BLOCK_SIZE)
    root = tl.load(root_positions_ptr + row)
    word = tl.arange(0, ROW_WORDS_PADDED)
    in_row = word < tl.load(layer_ptr + ROW_WORDS)

    # A path ascends, so the i-th token's source is at or above i: later chunks read
    # only above what this one writes, and each needs a barrier against itself alone.
    for start in range(1, path_len + 1, CHUNK):
        step = start + tl.arange(0, CHUNK)
        on_path = step <= path_len
        node = tl.load(paths_ptr + row * paths_stride + step, mask=on_path, other=0)
        moves = on_path & (node != step)
        source = root + node
        block = tl.load(block_table_ptr + source // block_size, mask=moves, other=0)
        source_row = block.to(tl.int64) * stride_block
        source_row += source % block_size * stride_slot
        target = root + step
        block = tl.load(block_table_ptr + target // block_size, mask=moves, other=0)
        target_row = block.to(tl.int64) * stride_block
        target_row += target % block_size * stride_slot
        in_tile = moves[:, None] & in_row[None, :]
        words = tl.load(cache_ptr + source_row[:, None] + word[None, :], mask=in_tile)
        tl.debug_barrier()
        tl.store(cache_ptr + target_row[:, None] + word[None, :], words, mask=in_tile)


def compact_kv(
    layers: KVLayers,
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    root_positions: torch.Tensor,  # [num_reqs] int32, KV index of the step's root
    paths: torch.Tensor,  # [num_reqs, max_num_nodes] int32, stale past path_lens
    path_lens: torch.Tensor,  # [num_reqs] int32, accepted nodes, root excluded
) -> None:
    """Move every layer's KV of the i-th accepted node from its own slot to the i-th.

    ``paths[:, 0]`` is the root, which stays. Node indices rise along a path, so a row
    only ever moves down, onto rows that were rejected or have moved already.
    """
    num_reqs = path_lens.shape[0]
    if num_reqs == 0:
        return
    row_words = triton.next_power_of_2(layers.max_row_words)
    _compact_kv_kernel[(num_reqs, len(layers.caches), layers.max_num_heads)](
        layers.table,
        slots,
        root_positions,
        paths,
        paths.stride(0),
        path_lens,
        WORD=WORD_TYPES[layers.word_bytes],
        ROW_WORDS_PADDED=row_words,
        CHUNK=chunk_size(row_words),
    )


def chunk_size(row_words: int) -> int:
    """Tokens that fit in a program: a longer path is moved in several chunks."""
    return max(1, min(16, MAX_TILE_WORDS // row_words))


def _check_layer(layer: int, cache: torch.Tensor, block_table: torch.Tensor) -> None:
    if cache.ndim != 4 or cache.stride(3) != 1:
        raise ValueError(
            f"layer {layer}: cache of shape {tuple(cache.shape)} and strides "
            f"{cache.stride()}; need [blocks, heads, block_size, row], last stride 1"
        )
    if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError(
            f"layer {layer}: block table is {block_table.dtype} with strides "
            f"{block_table.stride()}; need int32 rows with stride 1"
        )


def _granule(cache: torch.Tensor) -> int:
    """Bytes that divide the cache's address, its strides and its rows."""
    sizes = (*cache.stride()[:3], cache.shape[3])
    return math.gcd(cache.data_ptr(), *(size * cache.element_size() for size in sizes))


def _describe_layer(
    cache: torch.Tensor, block_table: torch.Tensor, word_bytes: int
) -> list[int]:
    def words(size: int) -> int:
        return size * cache.element_size() // word_bytes

    _, num_heads, block_size, row_size = cache.shape
    return [
        cache.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        *map(words, cache.stride()[:3]),
        num_heads,
        block_size,
        words(row_size),
    ]
