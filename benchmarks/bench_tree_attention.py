"""python benchmarks/bench_tree_attention.py"""

import importlib.util
import sys
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_treespec.kernels.reference.tree_attention import tree_attention as reference
from vllm_treespec.kernels.tree_attention import tree_attention
from vllm_treespec.testing.bench import median_us, print_table
from vllm_treespec.testing.trees import chain_parents, random_parents

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_SIZE**-0.5
OPTIONS = {"scale": SCALE, "sliding_window": None, "soft_cap": None}


class Row(NamedTuple):
    reqs: int
    context: int
    nodes: int
    tree_us: float
    sdpa_us: float  # of the tree, on keys already gathered: it pays for no paging
    chain_us: float
    vllm_chain_us: float  # NaN without vLLM


def seen_by(parents: torch.Tensor) -> torch.Tensor:
    """[num_reqs, num_nodes, num_nodes] bool, ancestors and self."""
    seen = torch.eye(parents.shape[1], dtype=torch.bool).repeat(len(parents), 1, 1)
    reqs = torch.arange(len(parents))
    for node in range(1, parents.shape[1]):
        seen[:, node] |= seen[reqs, parents[:, node].long()]
    return seen


def pack(seen: torch.Tensor) -> torch.Tensor:
    """[num_reqs, num_nodes, words] int32"""
    padded = torch.nn.functional.pad(seen, (0, -seen.shape[2] % 32))
    words = padded.unflatten(2, (-1, 32)).long() << torch.arange(32)
    return words.sum(3).int()


def make_batch(parents: torch.Tensor, context: int) -> dict[str, torch.Tensor]:
    num_reqs, num_nodes = parents.shape
    seq_len = context + num_nodes
    num_blocks = -(-seq_len // BLOCK_SIZE)
    seen = seen_by(parents)
    block_table = torch.randperm(num_reqs * num_blocks).view(num_reqs, -1).int()
    cache = torch.randn(
        (num_reqs * num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE),
        dtype=torch.bfloat16,
        device="cuda",
    )
    query = torch.randn(num_reqs * num_nodes, NUM_HEADS, HEAD_SIZE)
    batch = {
        "query": query.bfloat16(),
        "output": torch.zeros_like(query).bfloat16(),
        "query_start_loc": torch.arange(num_reqs + 1).int() * num_nodes,
        "seq_lens": torch.full((num_reqs,), seq_len).int(),
        "block_table": block_table,
        "num_nodes": torch.full((num_reqs,), num_nodes).int(),
        "depths": seen.sum(2).int() - 1,
        "masks": pack(seen),
    }
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    key_cache, value_cache = cache.split(HEAD_SIZE, dim=3)
    return batch | {"key_cache": key_cache, "value_cache": value_cache}


def time_checked(batch: dict[str, torch.Tensor], **options: Any) -> float:
    expected = torch.zeros_like(batch["output"])
    reference(**batch | {"output": expected}, **options)
    tree_attention(**batch, **options)
    torch.testing.assert_close(batch["output"], expected, rtol=2e-2, atol=2e-2)
    return median_us(lambda: tree_attention(**batch, **options))


def time_sdpa(batch: dict[str, torch.Tensor], parents: torch.Tensor) -> float:
    num_reqs, num_nodes = parents.shape
    seq_len = int(batch["seq_lens"][0])
    blocks = batch["block_table"].long()
    keys, values = (
        batch[name][blocks].transpose(2, 3).flatten(1, 2)[:, :seq_len].transpose(1, 2)
        for name in ("key_cache", "value_cache")
    )
    keys, values = keys.contiguous(), values.contiguous()
    query = batch["query"].unflatten(0, (num_reqs, num_nodes)).transpose(1, 2)
    visible = torch.ones(num_reqs, 1, num_nodes, seq_len, dtype=torch.bool)
    visible[:, 0, :, -num_nodes:] = seen_by(parents)
    visible = visible.cuda()

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=SCALE, enable_gqa=True
        )

    output = attend().transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(output, batch["output"], rtol=2e-2, atol=2e-2)
    return median_us(attend)


def time_vllm_chain(batch: dict[str, torch.Tensor], num_nodes: int) -> float:
    if importlib.util.find_spec("vllm") is None:
        return float("nan")
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    output = torch.zeros_like(batch["output"])

    def attend() -> None:
        unified_attention(
            q=batch["query"],
            k=batch["key_cache"].transpose(1, 2),
            v=batch["value_cache"].transpose(1, 2),
            out=output,
            cu_seqlens_q=batch["query_start_loc"],
            max_seqlen_q=num_nodes,
            seqused_k=batch["seq_lens"],
            max_seqlen_k=batch["block_table"].shape[1] * BLOCK_SIZE,
            softmax_scale=SCALE,
            causal=True,
            window_size=(-1, -1),
            block_table=batch["block_table"],
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )

    attend()
    torch.testing.assert_close(output, batch["output"], rtol=2e-2, atol=2e-2)
    return median_us(attend)


def measure(num_reqs: int, context: int, num_nodes: int) -> Row:
    parents = random_parents(num_reqs, num_nodes)
    tree = make_batch(parents, context)
    chain = make_batch(chain_parents(num_reqs, num_nodes), context)
    return Row(
        num_reqs,
        context,
        num_nodes,
        time_checked(tree, max_query_len=num_nodes, **OPTIONS),
        time_sdpa(tree, parents),
        time_checked(chain, max_query_len=num_nodes, **OPTIONS),
        time_vllm_chain(chain, num_nodes),
    )


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("tree_attention is timed on a CUDA device, and there is none here")
    sizes = [
        (reqs, context, nodes)
        for reqs, context in ((1, 1024), (1, 16384), (32, 1024), (32, 8192))
        for nodes in (1, 8, 32, 64, 256)
    ]
    heads = f"{NUM_HEADS} heads, {NUM_KV_HEADS} of KV, size {HEAD_SIZE}, bfloat16"
    print_table(f"tree_attention, {heads}", [measure(*size) for size in sizes])
