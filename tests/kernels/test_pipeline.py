"""Keys come two tiles ahead, by what Triton makes of every entry of the table."""

import os
import subprocess
import sys

import pytest

from vllm_treespec.kernels.attention_plan import table
from vllm_treespec.testing.offline_compile import Pipeline, pipeline

SCRIPT = """
import sys
from vllm_treespec.kernels.attention_plan import choose_tiles, table
from vllm_treespec.testing.kernel_variants import SPLIT, attention_of
from vllm_treespec.testing.offline_compile import launch_of, lower, pipeline
arch, head_size, cache_bytes = map(int, sys.argv[1:])
cache = None if cache_bytes == 2 else "fp8e4nv" if arch >= 89 else "fp8e5"
for tiles in table()[arch, head_size, cache_bytes]:
    tiles = choose_tiles([tiles], tiles.block_m, 4)
    arguments = attention_of(tiles, "bf16", 4, head_size, cache) | SPLIT
    launch = launch_of("tree_attention:_tree_attention_kernel", arguments)
    ttgir = lower(arch, launch)
    print(tiles.block_m, tiles.num_stages, "warp_group_dot" in ttgir, *pipeline(ttgir))
"""


@pytest.mark.parametrize(("arch", "head_size", "cache_bytes"), sorted(table()))
def test_two_tiles_are_on_their_way(arch: int, head_size: int, cache_bytes: int):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *map(str, (arch, head_size, cache_bytes))],
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == len(table()[arch, head_size, cache_bytes])
    for block_m, num_stages, reads_shared, num_buffers, tiles_ahead in lines:
        assert int(tiles_ahead) == int(num_stages) - 1 >= 2, f"{block_m} rows"
        # A product that reads keys from registers frees their buffer before the next
        # copy begins.
        reads_registers = reads_shared == "False"
        if cache_bytes == 2:
            assert int(num_buffers) == int(num_stages) - reads_registers


def test_a_loop_that_copies_nothing_has_no_pipeline():
    assert pipeline("tt.load") == Pipeline(num_buffers=0, tiles_ahead=0)
