"""Tiles of a launch, and how many programs share its work."""

from types import SimpleNamespace

import pytest
import torch

from vllm_treespec.kernels.attention_plan import (
    SplitBuffers,
    TileSizes,
    choose_tiles,
    default_tiles,
    table,
    tile_sizes,
)

CPU = torch.device("cpu")


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


def test_as_many_programs_as_run_at_once():
    split = SplitBuffers.of(132, CPU)
    assert split.num_programs(of_rows(128)) == 132 * 2
    assert split.num_programs(of_rows(16)._replace(programs_per_sm=5)) == 132 * 5


@pytest.mark.parametrize("block_m", [16, 64, 128, 256])
@pytest.mark.parametrize("head_size", [16, 128, 256])
@pytest.mark.parametrize("programs_per_sm", [1, 4, 50])
def test_the_scratch_is_never_overrun(
    block_m: int, head_size: int, programs_per_sm: int
):
    split = SplitBuffers.of(3, CPU)
    tiles = of_rows(block_m)._replace(
        head_size_padded=head_size, programs_per_sm=programs_per_sm
    )
    num_results = 2 * split.num_programs(tiles)
    assert num_results >= 2
    assert num_results * block_m * head_size <= split.weighted.numel()
    assert num_results * block_m <= split.peaks.numel() == split.totals.numel()
    assert num_results // 2 * 4 <= split.cuts.numel()


def test_every_tile_of_the_table_runs_as_often_as_it_fits():
    for tiles in (each for found in table().values() for each in found):
        split = SplitBuffers.of(1, CPU)
        assert split.num_programs(tiles) == tiles.programs_per_sm


@pytest.mark.parametrize(
    ("kib", "programs"), [(100, 1), (228, 2)], ids=["Ada", "Blackwell"]
)
def test_a_gpu_without_a_table_is_filled_by_the_default(
    kib: int, programs: int, monkeypatch: pytest.MonkeyPatch
):
    properties = SimpleNamespace(shared_memory_per_multiprocessor=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 7))
    tiles = tile_sizes(
        32, 4, 128, torch.bfloat16, torch.bfloat16, torch.device("cuda", 70 + programs)
    )
    assert tiles == default_tiles(128, 4, 128, 2)._replace(programs_per_sm=programs)
