"""kernels/compact_kv.py against its reference, and that against plain Python."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from vllm_treespec.kernels.compact_kv import KVLayers, chunk_size, compact_kv
from vllm_treespec.kernels.reference.compact_kv import compact_kv as reference

STALE = 0x2AAAAAAA  # in columns nobody may read
NUM_SLOTS = 7  # request slots, more than requests


@dataclass(frozen=True)
class Shape:
    """One layer's cache."""

    num_heads: int = 2
    block_size: int = 16
    row_size: int = 24
    dtype: torch.dtype = torch.float16


@dataclass
class Batch:
    layers: KVLayers
    slots: torch.Tensor
    root_positions: torch.Tensor
    paths: torch.Tensor
    path_lens: torch.Tensor

    def run(self, compact: Callable[..., None]) -> list[torch.Tensor]:
        """The caches after compaction, as bytes; the batch keeps its own."""
        # describe() anew: a copy lives elsewhere.
        caches = [copy_of(cache) for cache in self.layers.caches]
        layers = KVLayers.describe(caches, self.layers.block_tables)
        compact(layers, self.slots, self.root_positions, self.paths, self.path_lens)
        return [cache.view(torch.uint8) for cache in caches]

    def check(self) -> None:
        for actual, expected in zip(
            self.run(compact_kv), self.run(reference), strict=True
        ):
            assert torch.equal(actual, expected)


def copy_of(cache: torch.Tensor) -> torch.Tensor:
    """The same values under the same strides."""
    copy = torch.empty_strided(
        cache.shape, cache.stride(), dtype=cache.dtype, device=cache.device
    )
    return copy.copy_(cache)


def random_cache(
    num_blocks: int, shape: Shape, gen: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Random bits, NaN among them: rows must move bit for bit."""
    size = (num_blocks, shape.num_heads, shape.block_size)
    row_bytes = shape.row_size * shape.dtype.itemsize
    raw = torch.randint(256, (*size, row_bytes), generator=gen, dtype=torch.uint8)
    return raw.to(device).view(shape.dtype)


def make_batch(
    groups: Sequence[Sequence[Shape]],  # layers of one KV group share a block table
    roots_and_paths: Sequence[tuple[int, Sequence[int]]],  # without the root
    device: torch.device,
) -> Batch:
    gen = torch.Generator().manual_seed(0)
    longest = max(max((*path, 0)) + root for root, path in roots_and_paths) + 1
    caches, block_tables = [], []
    for shapes in groups:
        num_blocks = -(-longest // shapes[0].block_size)
        order = torch.randperm(NUM_SLOTS * num_blocks, generator=gen)
        block_table = order.view(NUM_SLOTS, num_blocks).int().to(device)
        for shape in shapes:
            caches.append(random_cache(order.numel(), shape, gen, device))
            block_tables.append(block_table)
    paths = torch.full((len(roots_and_paths), 1 + max(1, longest)), STALE).int()
    paths[:, 0] = 0
    for row, (_, path) in enumerate(roots_and_paths):
        paths[row, 1 : len(path) + 1] = torch.tensor(path)
    slots = torch.randperm(NUM_SLOTS, generator=gen)[: len(roots_and_paths)]
    return Batch(
        KVLayers.describe(caches, block_tables),
        slots.int().to(device),
        torch.tensor([root for root, _ in roots_and_paths]).int().to(device),
        paths.to(device),
        torch.tensor([len(path) for _, path in roots_and_paths]).int().to(device),
    )


def random_path(length: int, num_nodes: int, seed: int) -> list[int]:
    gen = torch.Generator().manual_seed(seed)
    nodes = torch.randperm(num_nodes - 1, generator=gen)[:length] + 1
    return sorted(nodes.tolist())


MIXED = [
    (30, [2, 5, 9]),
    (0, []),  # nothing accepted
    (15, [1, 2, 3, 40]),  # in place until the last
    (0, [1]),  # all of it in place
    (61, random_path(20, 70, seed=1)),
]


def test_reference_matches_plain_python(device: torch.device):
    shapes = [Shape(), Shape(num_heads=3, block_size=16)]
    batch = make_batch([shapes, [Shape(block_size=48)]], MIXED, device)
    expected = [cache.clone() for cache in batch.layers.caches]
    for cache, table in zip(expected, batch.layers.block_tables, strict=True):
        block_size = cache.shape[2]
        for row, (root, path) in enumerate(MIXED):
            blocks = table[batch.slots[row].item()].tolist()
            for step, node in enumerate(path, start=1):
                source, target = root + node, root + step
                cache[blocks[target // block_size], :, target % block_size] = cache[
                    blocks[source // block_size], :, source % block_size
                ].clone()
    for actual, cache in zip(batch.run(reference), expected, strict=True):
        assert torch.equal(actual, cache.view(torch.uint8))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("row_size", [24, 64, 5])
@pytest.mark.parametrize("block_size", [16, 48, 544])
def test_matches_reference(
    block_size: int, row_size: int, dtype: torch.dtype, device: torch.device
):
    shape = Shape(block_size=block_size, row_size=row_size, dtype=dtype)
    make_batch([[shape, replace(shape, num_heads=1)]], MIXED, device).check()


def test_groups_with_block_tables_and_shapes_of_their_own(device: torch.device):
    wide = Shape(num_heads=1, block_size=16, row_size=512)
    narrow = Shape(num_heads=3, block_size=64, row_size=80, dtype=torch.float32)
    batch = make_batch([[wide, wide], [narrow, Shape(block_size=64)]], MIXED, device)
    batch.check()
    assert batch.layers.table.shape[0] == 4 and batch.layers.word_bytes == 8


def test_a_path_of_a_thousand_nodes(device: torch.device):
    path = random_path(1000, 1025, seed=2)
    batch = make_batch([[Shape(num_heads=1, row_size=8)]], [(13, path)], device)
    assert batch.path_lens[0] > 2 * chunk_size(batch.layers.max_row_words)
    batch.check()


@pytest.mark.parametrize("shift", [1, 2, 15, 16, 17, 33])
def test_sources_that_are_also_targets_are_read_first(shift: int, device: torch.device):
    # Everything moves down by the shift: each row is a target, then was a source.
    path = list(range(1 + shift, 1 + shift + 40))
    batch = make_batch([[Shape(num_heads=1)]], [(7, path)], device)
    batch.check()
    cache, table = batch.layers.caches[0], batch.layers.block_tables[0]
    before = flat_rows(cache.view(torch.uint8), table[batch.slots[0]])
    after = flat_rows(batch.run(compact_kv)[0], table[batch.slots[0]])
    assert torch.equal(after[8 : 8 + 40], before[8 + shift : 8 + shift + 40])


def flat_rows(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[num_slots, heads, row] of one request."""
    return cache[blocks.long()].transpose(1, 2).flatten(0, 1)


def test_only_the_accepted_path_is_written(device: torch.device):
    #     0
    #    / \
    #   1   2      accepted: 0, 2, 4
    #   |   |
    #   3   4
    batch = make_batch([[Shape()]], [(14, [2, 4])], device)
    cache, table = batch.layers.caches[0], batch.layers.block_tables[0]
    after = batch.run(compact_kv)[0]
    written = torch.zeros(cache.shape[:3], dtype=torch.bool)
    blocks = table[batch.slots[0].item()].tolist()
    written[blocks[0], :, 15] = True
    written[blocks[1], :, 0] = True
    same = (after == cache.view(torch.uint8)).all(-1)
    assert torch.equal(~same.cpu(), written)


def test_nothing_accepted_reads_no_slot(device: torch.device):
    batch = make_batch([[Shape()]], [(5, []), (9, [])], device)
    batch.slots.fill_(STALE)
    batch.root_positions.fill_(STALE)
    before = batch.layers.caches[0].view(torch.uint8)
    assert torch.equal(batch.run(compact_kv)[0], before)
    assert torch.equal(batch.run(reference)[0], before)


def test_an_empty_batch_is_nothing_to_do(device: torch.device):
    batch = make_batch([[Shape()]], [(5, [2])], device)
    none = batch.path_lens[:0]
    compact_kv(batch.layers, none, none, batch.paths[:0], none)


def test_a_cache_shared_by_two_layers_moves_once(device: torch.device):
    batch = make_batch([[Shape()]], [(7, [2, 3, 5, 9])], device)
    cache, table = batch.layers.caches[0], batch.layers.block_tables[0]
    expected = batch.run(reference)[0]
    layers = KVLayers.describe([cache, cache], [table, table])
    compact_kv(layers, batch.slots, batch.root_positions, batch.paths, batch.path_lens)
    assert torch.equal(cache.view(torch.uint8), expected)


def test_groups_may_share_memory_in_different_blocks(device: torch.device):
    batch = make_batch([[Shape()]], [(7, [2, 3, 5, 9])], device)
    cache, table = batch.layers.caches[0], batch.layers.block_tables[0]
    # The second group owns blocks of requests that are not running.
    idle = (batch.slots + 1) % NUM_SLOTS
    other = table.clone()
    other[batch.slots.long()] = table[idle.long()]
    arguments = (batch.slots, batch.root_positions, batch.paths, batch.path_lens)
    expected = cache.clone()
    reference(KVLayers.describe([expected], [table]), *arguments)
    reference(KVLayers.describe([expected], [other]), *arguments)
    compact_kv(KVLayers.describe([cache, cache], [table, other]), *arguments)
    assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))


def test_strides_of_every_kind(device: torch.device):
    gen = torch.Generator().manual_seed(0)
    batch = make_batch([[Shape()], [Shape()]], MIXED, device)
    num_blocks = batch.layers.caches[0].shape[0]
    wide = random_cache(num_blocks, Shape(num_heads=16, row_size=30), gen, device)
    caches = [
        wide.transpose(1, 2)[..., 2:26],  # 16 heads of 16 tokens, tokens outermost
        wide[:, 3:5, :, 1:],  # an odd address: words of two bytes
    ]
    tables = [
        torch.nn.functional.pad(table, (1, 2), value=STALE)[:, 1:-2]
        for table in batch.layers.block_tables
    ]
    batch.layers = KVLayers.describe(caches, tables)
    assert batch.layers.word_bytes == 2
    batch.slots, batch.paths = batch.slots.long(), batch.paths[:, :30]
    batch.check()


def test_words_are_as_wide_as_every_layer_allows(device: torch.device):
    def word_bytes(*shapes: Shape) -> int:
        return make_batch([shapes], [(3, [2])], device).layers.word_bytes

    half = torch.float16
    assert word_bytes(Shape(row_size=24, dtype=half)) == 8
    assert word_bytes(Shape(row_size=24), Shape(row_size=6)) == 4
    assert word_bytes(Shape(row_size=24), Shape(row_size=7)) == 2
    assert word_bytes(Shape(row_size=3, dtype=torch.uint8)) == 1


def test_rejects_layers_it_cannot_describe(device: torch.device):
    layers = make_batch([[Shape()]], [(3, [2])], device).layers
    cache, table = layers.caches[0], layers.block_tables[0]
    with pytest.raises(ValueError, match="2 caches and 1 block tables"):
        KVLayers.describe([cache, cache], [table])
    with pytest.raises(ValueError, match="at least one layer"):
        KVLayers.describe([], [])
    with pytest.raises(ValueError, match=r"layer 0: .*last stride 1"):
        KVLayers.describe([cache[..., ::2]], [table])
    with pytest.raises(ValueError, match=r"block table is torch\.int64"):
        KVLayers.describe([cache], [table.long()])
