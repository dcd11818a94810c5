"""The model of GPU steps: its table is the committed one, and it obeys its own physics."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import model_gpu
from model_gpu import BEFORE, GPUS, NOW, TARGET


def test_the_committed_table_is_the_models():
    assert model_gpu.RESULT.read_text() == model_gpu.report()


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_nothing_is_faster_than_the_data_sheet(gpu):
    for cut in (BEFORE, NOW):
        for row in model_gpu.rows(cut):
            if row.gpu == gpu.name:
                read = 2 * TARGET.num_parameters
                read += row.requests * row.context * TARGET.kv_bytes
                assert min(row[3:]) > 1e3 * read / gpu.bytes_per_second


def test_an_even_cut_with_two_tiles_on_their_way_is_never_slower():
    for before, now in zip(model_gpu.rows(BEFORE), model_gpu.rows(NOW), strict=True):
        assert now.recycle < before.recycle
        assert now.suffix <= before.suffix + 0.1  # the tile that two programs share


def test_attention_on_an_h100_is_within_a_tenth_of_a_chains():
    trees = model_gpu.tree_ms(GPUS[0], TARGET, 8, 4096, NOW)
    assert trees < 1.1 * model_gpu.flash_ms(GPUS[0], TARGET, 8, 4096)
