"""How many segments a launch is cut into."""

import pytest
import torch

from vllm_treespec.kernels.attention_plan import (
    MAX_SEGMENTS,
    MIN_SEGMENT_KEYS,
    SplitBuffers,
    TileSizes,
    choose_tiles,
    default_tiles,
    table,
)

LLAMA_8B = {"num_heads": 32, "num_kv_heads": 8}


def split_of(num_sms: int, num_floats: int = 1 << 30) -> SplitBuffers:
    one = torch.empty(1)
    weighted = one.expand(num_floats)  # only its size is read
    return SplitBuffers(num_sms, weighted, one, one)


def segments(
    split: SplitBuffers, num_reqs: int, query_len: int, max_num_keys: int = 1 << 17
) -> int:
    return split.num_segments(
        default_tiles(query_len * 4, 4, 128, 2)._replace(programs_per_sm=2),
        num_tokens=num_reqs * query_len,
        num_reqs=num_reqs,
        max_query_len=query_len,
        max_num_keys=max_num_keys,
        **LLAMA_8B,
    )


def of_rows(block_m: int) -> TileSizes:
    return TileSizes(0, block_m, 64, 128, 4, 3, 2)


def test_the_smallest_tile_that_holds_a_request_is_taken():
    found = [of_rows(16), of_rows(64), of_rows(128)]
    for rows, group, block_m, block_q in (
        (1, 1, 16, 16),
        (16, 4, 16, 4),
        (20, 4, 64, 16),
        (64, 8, 64, 8),
        (132, 4, 128, 32),  # in several tiles
        (66, 6, 128, 21),
    ):
        tiles = choose_tiles(found, rows, group)
        assert (tiles.block_m, tiles.block_q) == (block_m, block_q)


def test_a_tile_holds_a_group_larger_than_any_of_the_table():
    tiles = choose_tiles([of_rows(16), of_rows(64)], 200, 100)
    assert (tiles.block_m, tiles.block_q) == (128, 1)


def test_the_table_has_tiles_for_every_row_count():
    assert {arch for arch, _, _ in table()} == {80, 90}
    for (_, head_size, cache_bytes), found in table().items():
        assert [tiles.block_m for tiles in found] == sorted(
            {tiles.block_m for tiles in found}
        )
        assert found[0].block_m == 16
        assert cache_bytes in (1, 2)
        assert all(tiles.head_size_padded == head_size for tiles in found)


def test_segments_fill_the_device_and_no_more():
    split = split_of(132)
    # 8 heads, and 3 tiles of 16 queries in a request of 33
    assert segments(split, 1, 33) == 264 // (3 * 8)
    assert segments(split, 4, 33) == 264 // (4 * 3 * 8)
    assert segments(split, 8, 33) == 1
    assert segments(split, 64, 33) == 1


def test_short_contexts_are_not_split():
    split = split_of(132)
    assert segments(split, 1, 33, max_num_keys=MIN_SEGMENT_KEYS) == 1
    assert segments(split, 1, 33, max_num_keys=3 * MIN_SEGMENT_KEYS) == 3


def test_there_are_never_too_many_to_merge():
    assert segments(split_of(10000), 1, 1) == MAX_SEGMENTS


@pytest.mark.parametrize("query_len", [1, 7, 33, 129])
@pytest.mark.parametrize("num_reqs", [1, 3, 16])
def test_the_scratch_is_never_overrun(num_reqs: int, query_len: int):
    split = split_of(132, num_floats=100_000)
    num_segments = segments(split, num_reqs, query_len)
    rows = num_reqs * query_len * LLAMA_8B["num_heads"]
    assert num_segments == 1 or num_segments * rows * 128 <= 100_000


def test_buffers_hold_the_peaks_of_the_narrowest_head(device: torch.device):
    split = SplitBuffers.allocate(device)
    assert split.peaks.shape == split.totals.shape
    assert split.peaks.numel() * 16 == split.weighted.numel()
