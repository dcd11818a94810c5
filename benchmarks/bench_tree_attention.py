"""python benchmarks/bench_tree_attention.py

Tree attention against what could stand in its place, each checked before it is timed.
Without a GPU it checks a tiny batch in Triton's interpreter and times nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    import treespec_cpu_host

    treespec_cpu_host.repair_interpreter()

from vllm_treespec.kernels.attention_plan import SplitBuffers
from vllm_treespec.kernels.reference.tree_attention import tree_attention as reference
from vllm_treespec.kernels.tree_attention import tree_attention
from vllm_treespec.testing.bench import median_us, print_table
from vllm_treespec.testing.roofline import A100, H200, Heads, attention_work
from vllm_treespec.testing.trees import chain_parents, random_parents

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-5
HEADS = Heads("Llama 8B", 32, 8, 128) if ON_GPU else Heads("tiny", 4, 2, 32)
BLOCK_SIZE = 16
SCALE = HEADS.head_size**-0.5
# (requests, context, nodes)
SIZES = (
    [
        (reqs, context, nodes)
        for reqs, context in ((1, 1024), (1, 16384), (8, 4096), (32, 1024), (32, 8192))
        for nodes in (1, 8, 32, 64)
    ]
    if ON_GPU
    else [(1, 300, 9), (2, 40, 5)]
)
NOTHING = float("nan")  # not here, or not on this device


class Row(NamedTuple):
    reqs: int
    context: int
    nodes: int
    bound_us: float  # roofline of the device
    whole_us: float  # our kernel, no tile of rows is cut
    split_us: float  # our kernel as vLLM launches it
    qq_bias_us: float  # vLLM's Triton kernel, with one tree for all requests
    flex_us: float  # on keys already gathered: it pays for no paging
    fa3_chain_us: float  # FlashAttention 3, which can verify a chain only


@dataclass
class Batch:
    parents: torch.Tensor  # [num_reqs, num_nodes] int32
    seen: torch.Tensor  # [num_reqs, num_nodes, num_nodes] bool, ancestors and self
    context: int
    tensors: dict[str, torch.Tensor]
    expected: torch.Tensor

    @property
    def num_nodes(self) -> int:
        return self.parents.shape[1]

    @property
    def options(self) -> dict[str, float | int | None]:
        return {
            "max_query_len": self.num_nodes,
            "scale": SCALE,
            "sliding_window": None,
            "soft_cap": None,
        }

    def checked_us(
        self, attend: Callable[[], torch.Tensor], expected: torch.Tensor | None = None
    ) -> float:
        expected = self.expected if expected is None else expected
        torch.testing.assert_close(
            attend(), expected, rtol=TOLERANCE, atol=TOLERANCE, msg="wrong, not fast"
        )
        return median_us(attend) if ON_GPU else NOTHING


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


def make_batch(parents: torch.Tensor, context: int) -> Batch:
    num_reqs, num_nodes = parents.shape
    seq_len = context + num_nodes
    num_blocks = -(-seq_len // BLOCK_SIZE)
    seen = seen_by(parents)
    shape = (num_reqs * num_blocks, HEADS.num_kv_heads, BLOCK_SIZE, 2 * HEADS.head_size)
    cache = torch.randn(shape, device=DEVICE).to(DTYPE)
    query = torch.randn(num_reqs * num_nodes, HEADS.num_heads, HEADS.head_size)
    tensors = {
        "query": query.to(DTYPE),
        "output": torch.zeros_like(query).to(DTYPE),
        "query_start_loc": torch.arange(num_reqs + 1).int() * num_nodes,
        "seq_lens": torch.full((num_reqs,), seq_len).int(),
        "block_table": torch.randperm(num_reqs * num_blocks).view(num_reqs, -1).int(),
        "num_nodes": torch.full((num_reqs,), num_nodes).int(),
        "depths": seen.sum(2).int() - 1,
        "masks": pack(seen),
    }
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    tensors["key_cache"], tensors["value_cache"] = cache.split(HEADS.head_size, dim=3)
    batch = Batch(parents, seen, context, tensors, torch.zeros_like(tensors["output"]))
    reference(**tensors | {"output": batch.expected}, **batch.options)
    return batch


def gathered(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [num_reqs, num_kv_heads, seq_len, head_size]."""
    blocks = batch.tensors["block_table"].long()
    seq_len = batch.context + batch.num_nodes
    keys, values = (
        batch.tensors[name][blocks].transpose(2, 3).flatten(1, 2)[:, :seq_len]
        for name in ("key_cache", "value_cache")
    )
    return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()


def tree_us(batch: Batch, split: SplitBuffers | None) -> float:
    output = torch.zeros_like(batch.expected)
    tensors = batch.tensors | {"output": output}

    def attend() -> torch.Tensor:
        tree_attention(**tensors, **batch.options, split=split)
        return output

    return batch.checked_us(attend)


def qq_bias_us(batch: Batch) -> float:
    # The interpreter takes its `and` of two tensors for Python's.
    if not ON_GPU:
        return NOTHING
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    tensors, output = batch.tensors, torch.zeros_like(batch.expected)
    assert (batch.parents == batch.parents[0]).all(), "one bias serves all requests"
    bias = torch.zeros(batch.seen.shape[1:]).masked_fill(~batch.seen[0], -torch.inf)
    bias = bias.to(DEVICE)

    def attend() -> torch.Tensor:
        unified_attention(
            q=tensors["query"],
            k=tensors["key_cache"].transpose(1, 2),
            v=tensors["value_cache"].transpose(1, 2),
            out=output,
            cu_seqlens_q=tensors["query_start_loc"],
            max_seqlen_q=batch.num_nodes,
            seqused_k=tensors["seq_lens"],
            max_seqlen_k=batch.context + batch.num_nodes,
            softmax_scale=SCALE,
            causal=True,
            window_size=(-1, -1),
            block_table=tensors["block_table"],
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            qq_bias=bias,
        )
        return output

    return batch.checked_us(attend)


def flex_us(batch: Batch) -> float:
    if not ON_GPU:
        return NOTHING  # it would be compiled for the CPU
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    num_reqs, num_nodes = batch.parents.shape
    keys, values = gathered(batch)
    query = batch.tensors["query"].unflatten(0, (num_reqs, num_nodes)).transpose(1, 2)
    query, seen, context = query.contiguous(), batch.seen.to(DEVICE), batch.context

    def sees(
        req: torch.Tensor, head: torch.Tensor, node: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        in_tree = (key - context).clamp(min=0)
        return (key < context) | seen[req, node, in_tree]

    mask = create_block_mask(
        sees, num_reqs, None, num_nodes, keys.shape[2], device="cuda"
    )
    torch._dynamo.reset()  # each size compiles anew, and there is a limit
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend() -> torch.Tensor:
        output = compiled(
            query, keys, values, block_mask=mask, scale=SCALE, enable_gqa=True
        )
        return output.transpose(1, 2).flatten(0, 1)

    return batch.checked_us(attend)


def fa3_chain_us(batch: Batch) -> float:
    if not ON_GPU or torch.cuda.get_device_capability()[0] != 9:
        return NOTHING
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    tensors = batch.tensors

    def attend() -> torch.Tensor:
        return flash_attn_varlen_func(  # type: ignore[no-any-return]
            q=tensors["query"],
            k=tensors["key_cache"].transpose(1, 2),
            v=tensors["value_cache"].transpose(1, 2),
            max_seqlen_q=batch.num_nodes,
            cu_seqlens_q=tensors["query_start_loc"],
            max_seqlen_k=batch.context + batch.num_nodes,
            seqused_k=tensors["seq_lens"],
            softmax_scale=SCALE,
            causal=True,
            block_table=tensors["block_table"],
            fa_version=3,
        )

    return batch.checked_us(attend)


def bound_us(num_reqs: int, num_nodes: int, context: int) -> float:
    devices = {(9, 0): H200, (8, 0): A100}
    capability = torch.cuda.get_device_capability() if ON_GPU else (0, 0)
    if capability not in devices:
        return NOTHING
    return attention_work(HEADS, num_reqs, num_nodes, context).least_us(
        devices[capability]
    )


def measure(split: SplitBuffers, num_reqs: int, context: int, num_nodes: int) -> Row:
    one_tree = random_parents(1, num_nodes).repeat(num_reqs, 1)
    tree = make_batch(random_parents(num_reqs, num_nodes), context)
    return Row(
        num_reqs,
        context,
        num_nodes,
        bound_us(num_reqs, num_nodes, context),
        tree_us(tree, None),
        tree_us(tree, split),
        qq_bias_us(make_batch(one_tree, context)),
        flex_us(tree),
        fa3_chain_us(make_batch(chain_parents(num_reqs, num_nodes), context)),
    )


if __name__ == "__main__":
    split = SplitBuffers.allocate(DEVICE)
    rows = [measure(split, *size) for size in SIZES]
    if ON_GPU:
        title = f"{HEADS.num_heads} heads, {HEADS.num_kv_heads} of KV, bfloat16"
        print_table(f"tree_attention, {title}", rows)
    else:
        print(
            f"{len(rows)} tiny batches are right in Triton's interpreter; speed is "
            "unmeasured, for there is no CUDA device here"
        )
