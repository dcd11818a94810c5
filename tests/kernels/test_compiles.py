"""Every kernel type-checks for a real GPU, on machines that have none.

The interpreter is Python: it accepts loop-carried dtype changes, mixed pointer
widths and other things the compiler rejects.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import triton.language as tl

from vllm_treespec.kernels.compact_kv import chunk_size
from vllm_treespec.kernels.tree_attention import tile_sizes

# A string is a run-time type, anything else the value of a constexpr.
Arguments = dict[str, Any]

# compute capability -> bytes of shared memory a block can have
SHARED_MEMORY = {80: 166912, 90: 232448}


def tree_attention(dtype: str, group: int, head_size: int, **changes: Any) -> Arguments:
    element_size = 4 if dtype == "fp32" else 2
    max_query_len = changes.pop("max_query_len", 33)
    tiles = tile_sizes(max_query_len, group, head_size, element_size)
    return {
        "query_ptr": f"*{dtype}",
        "query_stride_token": "i32",
        "query_stride_head": "i32",
        "key_ptr": f"*{dtype}",
        "key_stride_block": "i32",
        "key_stride_head": "i32",
        "key_stride_slot": "i32",
        "value_ptr": f"*{dtype}",
        "value_stride_block": "i32",
        "value_stride_head": "i32",
        "value_stride_slot": "i32",
        "output_ptr": f"*{dtype}",
        "output_stride_token": "i32",
        "output_stride_head": "i32",
        "query_start_loc_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "block_table_ptr": "*i32",
        "block_table_stride": "i32",
        "num_nodes_ptr": "*i32",
        "depths_ptr": "*i32",
        "depths_stride": "i32",
        "masks_ptr": "*i32",
        "masks_stride_req": "i32",
        "masks_stride_node": "i32",
        "num_reqs": "i32",
        "scale": "fp32",
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_PADDED": tiles.head_size_padded,
        "BLOCK_SIZE": 16,
        "SLIDING_WINDOW": 0,
        "SOFT_CAP": 0.0,
        "BLOCK_Q": tiles.block_q,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
    } | changes


def compact_kv(word: tl.dtype, row_words: int) -> Arguments:
    return {
        "layers_ptr": "*i64",
        "slots_ptr": "*i32",
        "root_positions_ptr": "*i32",
        "paths_ptr": "*i32",
        "paths_stride": "i32",
        "path_lens_ptr": "*i32",
        "WORD": word,
        "ROW_WORDS_PADDED": row_words,
        "CHUNK": chunk_size(row_words),
    }


# "module:kernel variant" -> its arguments as the wrapper passes them.
SIGNATURES: dict[str, Arguments] = {
    "compact_kv:_compact_kv_kernel 8-byte words": compact_kv(tl.int64, 64),
    "compact_kv:_compact_kv_kernel 1-byte words": compact_kv(tl.int8, 2048),
    "tree_attention:_tree_attention_kernel bf16": tree_attention("bf16", 4, 128),
    "tree_attention:_tree_attention_kernel fp16 window": tree_attention(
        "fp16", 3, 80, SLIDING_WINDOW=4096
    ),
    "tree_attention:_tree_attention_kernel bf16 wide window soft-cap": tree_attention(
        "bf16", 2, 256, SLIDING_WINDOW=4096, SOFT_CAP=72.1, BLOCK_SIZE=544
    ),
    "tree_attention:_tree_attention_kernel fp32 wide": tree_attention("fp32", 7, 256),
    "tree_attention:_tree_attention_kernel bf16 decode": tree_attention(
        "bf16",
        1,
        64,
        max_query_len=1,
        key_stride_block="i64",
        value_stride_block="i64",
    ),
}

# One process compiles everything: importing Triton takes longer than most kernels.
SCRIPT = """
import importlib, sys, traceback, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
signatures, limits = eval(sys.stdin.read())
errors = {}
for variant, arguments in signatures.items():
    module, name = variant.split()[0].split(":")
    kernel = getattr(importlib.import_module(f"vllm_treespec.kernels.{module}"), name)
    types = {k: v if isinstance(v, str) else "constexpr" for k, v in arguments.items()}
    values = {k: v for k, v in arguments.items() if not isinstance(v, str)}
    # What a launch finds in aligned tensors: such loads are staged in shared memory.
    hints = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, value in arguments.items()
        if isinstance(value, str) and (value[0] == "*" or "_stride" in name)
    }
    for arch, shared_memory in limits.items():
        try:
            source = ASTSource(kernel, types, values, hints)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
            assert compiled.asm["cubin"]
            assert compiled.metadata.shared <= shared_memory, "tiles too large"
        except Exception:
            errors[variant, arch] = traceback.format_exc()
print(errors)
"""


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, int], str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],
        env=env,
        input=repr((SIGNATURES, SHARED_MEMORY)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return eval(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("variant", SIGNATURES)
def test_compiles(variant: str, arch: int, errors: dict[tuple[str, int], str]):
    assert (variant, arch) not in errors, errors[variant, arch][-2000:]
