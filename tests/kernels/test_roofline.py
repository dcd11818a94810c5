"""The model of tree attention against sums by hand, and compile reports."""

import pytest

from vllm_treespec.testing.offline_compile import Compiled
from vllm_treespec.testing.roofline import H200, LLAMA_8B, attention_work


def test_a_decode_reads_every_key_and_value_once():
    work = attention_work(LLAMA_8B, num_reqs=2, num_nodes=1, context=1023)
    # 8 KV heads of 128 halves, keys and values; 32 heads in and out
    assert work.num_bytes == 2 * (1024 * 8 * 128 * 2 * 2 + 2 * 32 * 128 * 2)
    assert work.num_flops == 2 * 1024 * 32 * 128 * 4
    assert work.least_us(H200) == pytest.approx(work.num_bytes / 4.8e6)


def test_many_nodes_are_bound_by_arithmetic():
    work = attention_work(LLAMA_8B, num_reqs=1, num_nodes=1024, context=32768)
    assert work.intensity > 989 / 4.8
    assert work.least_us(H200) == pytest.approx(work.num_flops / 989e6)


def test_a_quantized_cache_is_half_as_long():
    plain = attention_work(LLAMA_8B, 1, 1, 8191)
    quantized = attention_work(LLAMA_8B, 1, 1, 8191, cache_bytes=1)
    assert plain.num_bytes - quantized.num_bytes == 8192 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("compiled", "programs"),
    [
        (Compiled(4, 128, 0, 1000), 4),  # registers
        (Compiled(4, 129, 0, 1000), 3),  # of which a thread gets eight at a time
        (Compiled(4, 32, 0, 100 * 1024), 2),  # shared memory
        (Compiled(8, 32, 0, 0), 8),  # threads
    ],
)
def test_programs_at_once_are_bound_by_what_runs_out(compiled: Compiled, programs: int):
    assert compiled.programs_per_sm(90) == programs
