"""kernels/tree_attention.py against its reference, and that against plain Python."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch

from vllm_treespec.kernels.attention_plan import SplitBuffers, default_tiles
from vllm_treespec.kernels.host_attention import CHUNK, host_attention
from vllm_treespec.kernels.reference.tree_attention import tree_attention as reference
from vllm_treespec.kernels.tree_attention import tree_attention
from vllm_treespec.testing.trees import chain_parents, random_parents

CPU = torch.device("cpu")
NAN = float("nan")
UNTOUCHED = 77.0
STALE = 0x2AAAAAAA  # in columns nobody may read

#     0
#    / \
#   1   2
#   |  / \
#   3 4   5
SMALL_TREE = [-1, 0, 0, 1, 2, 2]


class Request(NamedTuple):
    num_context: int  # keys of earlier steps
    num_prefill: int  # causal rows of this step
    parents: list[int]  # tree rows of this step, after the causal ones

    @property
    def query_len(self) -> int:
        return self.num_prefill + len(self.parents)

    @property
    def seq_len(self) -> int:
        return self.num_context + self.query_len


def tree(num_nodes: int, seed: int = 0) -> list[int]:
    return random_parents(1, num_nodes, seed)[0].tolist()


def chain(num_nodes: int) -> list[int]:
    return chain_parents(1, num_nodes)[0].tolist()


MIXED = [
    Request(37, 0, SMALL_TREE),
    Request(0, 19, []),  # a prompt
    Request(53, 0, [-1]),  # a single decode
    Request(0, 0, []),  # a padded request
    Request(70, 21, tree(9)),  # a chunk of prefill, then a tree
    Request(66, 1, []),
    Request(5, 0, chain(7)),
]


@dataclass
class Batch:
    """Arguments of the kernel over poisoned memory, and the keys laid out flat."""

    requests: list[Request]
    arguments: dict[str, torch.Tensor]
    keys: list[torch.Tensor]  # per request [seq_len, num_kv_heads, head_size]
    values: list[torch.Tensor]

    def run(self, attention: Any, **options: Any) -> torch.Tensor:
        output = self.arguments["output"].clone()
        attention(
            **{**self.arguments, "output": output},
            **{
                "max_query_len": max(request.query_len for request in self.requests),
                "scale": self.keys[0].shape[-1] ** -0.5,
                "sliding_window": None,
                "soft_cap": None,
                **options,
            },
        )
        return output

    def check(self, rtol: float = 1e-5, atol: float = 2e-6, **options: Any) -> None:
        torch.testing.assert_close(
            self.run(tree_attention, **options),
            self.run(reference, **options),
            rtol=rtol,
            atol=atol,
        )


def pack_tree(
    parents: list[int], max_num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depths and mask words of one tree, stale past its nodes."""
    num_nodes = len(parents)
    words = -(-max_num_nodes // 32)
    seen = torch.zeros(num_nodes, words * 32, dtype=torch.int64)
    depths = torch.full((max_num_nodes,), STALE, dtype=torch.int32)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] = seen[parent]
        seen[node, node] = 1
        depths[node] = seen[node].sum() - 1
    masks = torch.full((max_num_nodes, words), STALE, dtype=torch.int32)
    powers = 2 ** torch.arange(32)
    masks[:num_nodes] = (seen.view(num_nodes, words, 32) * powers).sum(2).int()
    return depths, masks


def make_batch(
    requests: list[Request],
    device: torch.device,
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_size: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,  # else dtype
    sliding_window: int = 1 << 20,  # keys that leave it are poisoned
    num_padding: int = 0,
) -> Batch:
    gen = torch.Generator().manual_seed(0)
    num_blocks = [-(-request.seq_len // block_size) for request in requests]
    # Blocks lie in no order, and the last one, poisoned, pads every block table.
    order = torch.randperm(sum(num_blocks), generator=gen).int().split(num_blocks)
    unused = sum(num_blocks)
    block_table = torch.full((len(requests), max(num_blocks) + 1), unused).int()
    cache = torch.full((unused + 1, num_kv_heads, block_size, 2 * head_size), NAN)
    max_num_nodes = max(*(len(request.parents) for request in requests), 1)
    depths = torch.full((len(requests) + 1, max_num_nodes), STALE).int()
    masks = torch.full((*depths.shape, -(-max_num_nodes // 32)), STALE).int()
    keys, values = [], []
    for row, request in enumerate(requests):
        packed = torch.randn(
            request.seq_len, num_kv_heads, 2 * head_size, generator=gen
        )
        packed = packed.to(cache_dtype or dtype).float()
        packed[: max(0, request.num_context - sliding_window + 1)] = NAN
        blocks = order[row]
        block_table[row, : len(blocks)] = blocks
        slots = torch.arange(request.seq_len)
        cache[blocks[slots // block_size], :, slots % block_size] = packed
        keys.append(packed[..., :head_size])
        values.append(packed[..., head_size:])
        if len(request.parents) > 1:
            depths[row], masks[row] = pack_tree(request.parents, max_num_nodes)
    query_lens = torch.tensor([0, *(request.query_len for request in requests)])
    query_start_loc = query_lens.cumsum(0)
    num_tokens = int(query_start_loc[-1])
    shape = (num_tokens + num_padding, num_kv_heads * group, head_size)
    query = torch.randn(shape, generator=gen)
    query[num_tokens:] = NAN
    cache = cache.to(cache_dtype or dtype).to(device)
    arguments = {
        "query": query.to(dtype),
        "output": torch.full(shape, UNTOUCHED, dtype=dtype),
        "query_start_loc": query_start_loc.int(),
        "seq_lens": torch.tensor([request.seq_len for request in requests]).int(),
        "block_table": block_table,
        "num_nodes": torch.tensor([len(request.parents) for request in requests]).int(),
        "depths": depths,
        "masks": masks,
    }
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    arguments["key_cache"] = cache[..., :head_size]
    arguments["value_cache"] = cache[..., head_size:]
    return Batch(requests, arguments, keys, values)


def grow(
    batch: Batch, attention: Any, ends: list[list[int]], **options: Any
) -> torch.Tensor:
    """The same rows a few at a time: ``ends`` has, for every step, how many rows each
    request has behind it. Later keys, masks and depths are poison until their step."""
    whole = batch.arguments
    output = whole["output"].clone()
    starts = whole["query_start_loc"].tolist()
    begins = [[0] * len(batch.requests), *ends]
    for begin, end in zip(begins, ends, strict=False):
        step = {name: tensor.clone() for name, tensor in whole.items()}
        for name, poison in (
            ("key_cache", NAN),
            ("value_cache", NAN),
            ("depths", STALE),
            ("masks", STALE),
        ):
            step[name].fill_(poison)
        rows: list[int] = []
        for req, request in enumerate(batch.requests):
            rows += range(starts[req] + begin[req], starts[req] + end[req])
            step["query_start_loc"][req + 1] = len(rows)
            seq_len = request.num_context + end[req]
            step["seq_lens"][req] = seq_len
            num_nodes = max(end[req] - request.num_prefill, 0)
            step["num_nodes"][req] = num_nodes
            for name in ("depths", "masks"):
                step[name][req, :num_nodes] = whole[name][req, :num_nodes]
            slots = torch.arange(seq_len, device=output.device)
            block_size = whole["key_cache"].shape[2]
            blocks = whole["block_table"][req][slots // block_size].long()
            for name in ("key_cache", "value_cache"):
                keys = whole[name][blocks, :, slots % block_size]
                step[name][blocks, :, slots % block_size] = keys
        step["query"], step["output"] = whole["query"][rows], output[rows]
        now = Batch(batch.requests, step, batch.keys, batch.values)
        output[rows] = now.run(attention, **options)
    return output


def split_among(batch: Batch, num_programs: int) -> SplitBuffers:
    """Poisoned scratch that divides this batch among so many programs."""
    device = batch.arguments["query"].device
    split = SplitBuffers.of(num_programs, device, min_keys=1)
    for tensor in (split.weighted, split.peaks, split.totals):
        tensor.fill_(NAN)
    split.cuts.fill_(STALE)
    return split


def naive(batch: Batch, sliding_window: int, soft_cap: float) -> torch.Tensor:
    """One query row, one head, one key at a time, from the parents alone."""
    query = batch.arguments["query"].double().cpu()
    output = torch.full_like(query, UNTOUCHED)
    rows = iter(range(query.shape[0]))
    for request, keys, values in zip(
        batch.requests, batch.keys, batch.values, strict=True
    ):
        before_root = request.num_context + request.num_prefill
        paths: list[list[int]] = []
        for node, parent in enumerate(request.parents):
            paths.append([*(paths[parent] if parent >= 0 else []), node])
        for step in range(request.query_len):
            # (slot, position) of all keys this row may see
            if step < request.num_prefill:
                seen = [(key, key) for key in range(request.num_context + step + 1)]
            else:
                path = paths[step - request.num_prefill]
                seen = [(key, key) for key in range(before_root)]
                seen += [
                    (before_root + node, before_root + depth)
                    for depth, node in enumerate(path)
                ]
            position = seen[-1][1]
            slots = [slot for slot, key in seen if position - key < sliding_window]
            row = next(rows)
            for head in range(query.shape[1]):
                kv_head = head * keys.shape[1] // query.shape[1]
                scores = keys[slots, kv_head].double() @ query[row, head]
                scores *= keys.shape[2] ** -0.5
                scores = soft_cap * torch.tanh(scores / soft_cap)
                output[row, head] = scores.softmax(0) @ values[slots, kv_head].double()
    return output


@pytest.mark.parametrize("sliding_window", [1 << 20, 40, 7, 2, 1])
def test_reference_matches_plain_python(sliding_window: int, device: torch.device):
    batch = make_batch(MIXED, device, sliding_window=sliding_window, num_padding=3)
    output = batch.run(reference, sliding_window=sliding_window, soft_cap=0.5)
    expected = naive(batch, sliding_window, 0.5)
    torch.testing.assert_close(output.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("head_size", "group", "block_size"),
    [(32, 1, 16), (32, 3, 48), (32, 7, 16), (80, 1, 48), (80, 3, 16), (80, 4, 48)],
)
def test_matches_reference(
    head_size: int, group: int, block_size: int, device: torch.device
):
    make_batch(
        MIXED, device, group=group, head_size=head_size, block_size=block_size
    ).check()


@pytest.mark.parametrize("head_size", [64, 96, 112, 128, 192, 256])
def test_every_head_size(head_size: int, device: torch.device):
    make_batch(MIXED[:5], device, num_kv_heads=1, head_size=head_size).check()


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 544])
def test_every_block_size(block_size: int, device: torch.device):
    request = Request(600, 0, SMALL_TREE)
    make_batch([*MIXED, request], device, num_kv_heads=1, block_size=block_size).check()


@pytest.mark.parametrize("group", [5, 6, 16, 20])
def test_every_group_size(group: int, device: torch.device):
    make_batch(MIXED, device, num_kv_heads=1, group=group).check()


SCALES = {"key_scale": torch.tensor(0.5), "value_scale": torch.tensor([3.0])}
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def on(device: torch.device, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("cache_dtype", FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantized_caches(
    cache_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
):
    batch = make_batch(
        MIXED, device, num_kv_heads=1, dtype=dtype, cache_dtype=cache_dtype
    )
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (3e-3, 6e-3)
    batch.check(rtol, atol, **on(device, SCALES))
    split = split_among(batch, 3)
    batch.check(rtol, atol, soft_cap=0.3, split=split, **on(device, SCALES))


@pytest.mark.parametrize(
    "attention", [tree_attention, reference], ids=["triton", "reference"]
)
def test_scales_multiply_what_is_stored(attention: Any, device: torch.device):
    options = {"cache_dtype": torch.float8_e4m3fn, "num_kv_heads": 1}
    batch = make_batch(MIXED[:3], device, **options)
    output = batch.run(attention, soft_cap=2.0, **on(device, SCALES))
    batch.keys = [keys * 0.5 for keys in batch.keys]
    batch.values = [values * 3.0 for values in batch.values]
    expected = naive(batch, 1 << 20, 2.0)
    torch.testing.assert_close(output.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_of_another_half_precision(device: torch.device):
    batch = make_batch(
        MIXED[:3], device, dtype=torch.float16, cache_dtype=torch.bfloat16
    )
    batch.check(rtol=2e-3, atol=2e-3)


def test_half_precision(device: torch.device):
    batch = make_batch(MIXED, device, dtype=torch.float16)
    batch.check(rtol=2e-3, atol=2e-3)


# 31 to 33 and 63 to 65: the edges of a mask word; contexts move it against the tiles.
@pytest.mark.parametrize("num_nodes", [2, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("num_context", [0, 1, 63, 100])
def test_masks_of_many_words(num_nodes: int, num_context: int, device: torch.device):
    request = Request(num_context, 0, tree(num_nodes, seed=num_nodes))
    make_batch([request], device, num_kv_heads=1, group=1).check()


# 128 keys are more than a block; 16 fewer than a mask word.
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 128), (64, 16), (128, 64)])
def test_tiles_of_any_size(block_m: int, block_n: int, device: torch.device):
    tiles = default_tiles(1, 4, 32, 4)._replace(
        block_m=block_m, block_q=block_m // 4, block_n=block_n
    )
    requests = [Request(300, 0, tree(33)), Request(0, 0, [-1]), Request(20, 40, [])]
    batch = make_batch(requests, device, num_kv_heads=1, group=4, sliding_window=90)
    batch.check(tiles=tiles, sliding_window=90)
    batch.check(tiles=tiles, sliding_window=90, split=split_among(batch, 3))


def test_a_tree_of_a_thousand_nodes(device: torch.device):
    request = Request(45, 3, tree(1025))
    make_batch([request], device, num_kv_heads=1, group=1).check()


@pytest.mark.parametrize("sliding_window", [1, 2, 5, 16, 40, 64, 100])
def test_sliding_windows(sliding_window: int, device: torch.device):
    requests = [*MIXED, Request(200, 0, tree(50)), Request(99, 70, chain(5))]
    batch = make_batch(requests, device, num_kv_heads=1, sliding_window=sliding_window)
    batch.check(sliding_window=sliding_window)


def test_soft_cap_bounds_every_score(device: torch.device):
    batch = make_batch(MIXED, device, num_kv_heads=1)
    batch.check(soft_cap=30.0)
    batch.check(soft_cap=0.3, sliding_window=9)
    batch.check(soft_cap=50.0, scale=1e4)  # tanh is 1 long before its exponential ends
    # A cap of almost nothing makes all scores equal: the mean of what is seen.
    root = batch.run(tree_attention, soft_cap=1e-6)[0, 0]
    torch.testing.assert_close(root.cpu(), batch.values[0][:38, 0].mean(0))


@pytest.mark.parametrize("num_programs", [1, 40])
@pytest.mark.parametrize("sliding_window", [None, 5])
def test_sinks(num_programs: int, sliding_window: int | None, device: torch.device):
    batch = make_batch(
        MIXED, device, num_padding=3, sliding_window=sliding_window or 1 << 20
    )
    sinks = torch.tensor([-2.0, 0.0, 1.5, 30.0], device=device)
    options = {
        "sliding_window": sliding_window,
        "split": split_among(batch, num_programs),
    }
    batch.check(sinks=sinks, **options)
    batch.check(sinks=sinks.half(), soft_cap=0.5, **options)


@pytest.mark.parametrize(
    "attention", [tree_attention, reference], ids=["triton", "reference"]
)
def test_a_sink_is_a_key_whose_value_is_nothing(attention: Any, device: torch.device):
    batch = make_batch([Request(20, 0, [-1])], device, num_kv_heads=1, group=2)
    sinks = torch.tensor([0.0, 3.0], device=device)
    output = batch.run(attention, scale=0.0, sinks=sinks)
    total = 21 + sinks.exp()
    expected = batch.values[0][:, 0].sum(0).to(device) / total[:, None]
    torch.testing.assert_close(output[0], expected)


@pytest.mark.parametrize("num_programs", [1, 3])
def test_scores_far_below_zero_keep_their_weights(
    num_programs: int, device: torch.device
):
    batch = make_batch([Request(70, 0, [-1])], device, num_kv_heads=1)
    batch.arguments["query"].fill_(40.0)
    batch.arguments["key_cache"].fill_(-40.0)
    output = batch.run(tree_attention, split=split_among(batch, num_programs))
    mean = batch.values[0][:, 0].mean(0).to(device)
    torch.testing.assert_close(output[0], mean.expand(2, -1))


@pytest.mark.parametrize("num_programs", [1, 3])
def test_a_row_that_sees_a_sink_alone_gives_zeros(
    num_programs: int, device: torch.device
):
    batch = make_batch([Request(30, 0, chain(3))], device, sliding_window=1)
    batch.arguments["masks"][0, 1] = 0
    sinks = torch.tensor([-40.0, 0.0, 1.0, 50.0], device=device)
    split = split_among(batch, num_programs)
    output = batch.run(tree_attention, sliding_window=1, split=split, sinks=sinks)
    assert (output[1] == 0).all()
    assert output.isfinite().all()


def test_siblings_do_not_see_each_other(device: torch.device):
    #   0
    #  / \
    # 1   2
    request = Request(20, 0, [-1, 0, 0])
    batch = make_batch([request], device)
    seen = batch.run(tree_attention)
    batch.arguments["key_cache"][batch.arguments["block_table"][0, 1].item(), :, 5] = 9
    changed = (batch.run(tree_attention) != seen).flatten(1).any(1)
    assert changed.tolist() == [False, True, False], "only node 1 reads its own key"


def test_a_cousin_at_the_same_depth_stays_hidden(device: torch.device):
    #    0
    #   / \
    #  1   2
    #  |   |
    #  3   4
    batch = make_batch([Request(9, 0, [-1, 0, 0, 1, 2])], device)
    seen = batch.run(tree_attention)
    block = batch.arguments["block_table"][0, 0].item()
    batch.arguments["key_cache"][block, :, 9 + 3] = 9.0
    changed = (batch.run(tree_attention) != seen).flatten(1).any(1)
    assert changed.tolist() == [False, False, False, True, False]
    batch.arguments["key_cache"][block, :, 9 + 1] = 9.0
    changed = (batch.run(tree_attention) != seen).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, True, False], "the parent's too"


def test_the_window_measures_depth_and_not_slots(device: torch.device):
    # A star: the last child's slot is ten past the root's, its position one.
    star = [-1, *[0] * 10]
    batch = make_batch([Request(20, 0, star)], device)
    output = batch.run(tree_attention, sliding_window=3, scale=0.0)
    values = batch.values[0][:, 0]
    for node in range(1, 11):
        mean = values[[19, 20, 20 + node]].mean(0)
        torch.testing.assert_close(output[node, 0].cpu(), mean)
    torch.testing.assert_close(output[0, 0].cpu(), values[18:21].mean(0))


def test_a_node_deeper_than_the_window_loses_the_root(device: torch.device):
    batch = make_batch([Request(20, 0, chain(5))], device)
    output = batch.run(tree_attention, sliding_window=3, scale=0.0)
    mean = batch.values[0][22:25, 0].mean(0)
    torch.testing.assert_close(output[4, 0].cpu(), mean)


def test_prefill_rows_before_a_tree_are_causal(device: torch.device):
    batch = make_batch([Request(4, 3, SMALL_TREE)], device)
    output = batch.run(tree_attention, scale=0.0)
    values = batch.values[0][:, 0]
    for row in range(3):
        mean = values[: 4 + row + 1].mean(0)
        torch.testing.assert_close(output[row, 0].cpu(), mean)
    # the root of SMALL_TREE lies at 7; node 5's path is 0, 2, 5
    mean = values[[*range(8), 9, 12]].mean(0)
    torch.testing.assert_close(output[3 + 5, 0].cpu(), mean)


@pytest.mark.parametrize("num_nodes", [0, 1])
def test_without_a_tree_masks_and_depths_are_not_read(
    num_nodes: int, device: torch.device
):
    batch = make_batch([Request(30, 0, chain(6))], device)
    expected = batch.run(reference, sliding_window=4)
    batch.arguments["num_nodes"].fill_(num_nodes)
    batch.arguments["masks"].fill_(0)
    batch.arguments["depths"].fill_(STALE)
    for attention in (tree_attention, reference):
        output = batch.run(attention, sliding_window=4)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)


def test_padding_rows_stay_untouched(device: torch.device):
    batch = make_batch(MIXED, device, num_kv_heads=1, num_padding=40)
    output = batch.run(tree_attention)
    assert (output[-40:] == UNTOUCHED).all()
    assert output[:-40].isfinite().all() and (output[:-40] != UNTOUCHED).all()
    batch.check()


def test_a_batch_of_padded_requests_writes_nothing(device: torch.device):
    batch = make_batch([Request(0, 0, [])] * 3, device, num_padding=5)
    assert (batch.run(tree_attention, max_query_len=1) == UNTOUCHED).all()
    assert (batch.run(reference, max_query_len=1) == UNTOUCHED).all()


def test_a_row_that_sees_nothing_gives_zeros(device: torch.device):
    batch = make_batch([Request(30, 0, chain(3))], device, sliding_window=1)
    batch.arguments["masks"][0, 1] = 0
    for attention in (tree_attention, reference):
        output = batch.run(attention, sliding_window=1)
        assert (output[1] == 0).all()
        assert output.isfinite().all()


def test_max_query_len_only_sizes_the_tiles(device: torch.device):
    batch = make_batch(MIXED, device, num_kv_heads=1)
    expected = batch.run(reference)
    for max_query_len in (1, 4, 16, 1000):
        output = batch.run(tree_attention, max_query_len=max_query_len)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)


# Of 1 nothing is cut; of 150 most have nothing to do.
@pytest.mark.parametrize("num_programs", [1, 2, 7, 23, 150])
@pytest.mark.parametrize("sliding_window", [None, 40, 1])
def test_the_parts_of_all_programs_add_up(
    num_programs: int, sliding_window: int | None, device: torch.device
):
    batch = make_batch(
        [*MIXED, Request(200, 0, tree(50))],
        device,
        num_kv_heads=3,
        group=3,
        head_size=48,
        sliding_window=sliding_window or 1 << 20,
        num_padding=5,
    )
    split = split_among(batch, num_programs)
    batch.check(sliding_window=sliding_window, split=split, soft_cap=0.3)


@pytest.mark.parametrize("num_nodes", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("num_context", [0, 1, 64, 130])
def test_parts_of_every_tree(num_nodes: int, num_context: int, device: torch.device):
    request = Request(num_context, 0, tree(num_nodes))
    batch = make_batch([request], device, num_kv_heads=1, group=1, block_size=64)
    batch.check(split=split_among(batch, 3))


# One long request beside short ones, before, between and behind them, some of them empty.
LONG = Request(1500, 0, tree(40))
SHORT = [Request(11, 0, tree(5)), Request(0, 0, []), Request(70, 0, [-1])]


@pytest.mark.parametrize("num_programs", [5, 16])
@pytest.mark.parametrize(
    "requests",
    [[LONG, *SHORT], [*SHORT, LONG, *SHORT], [*SHORT, *SHORT, LONG]],
    ids=["first", "between", "last"],
)
@pytest.mark.parametrize("sliding_window", [None, 100])
def test_a_long_request_beside_short_ones(
    requests: list[Request],
    num_programs: int,
    sliding_window: int | None,
    device: torch.device,
):
    batch = make_batch(
        requests, device, num_padding=3, sliding_window=sliding_window or 1 << 20
    )
    split = split_among(batch, num_programs)
    batch.check(sliding_window=sliding_window, split=split)


def test_more_requests_than_are_looked_at_together(device: torch.device):
    # Empty ones at both sides of the border, and one of many tiles across it.
    requests = [
        Request(row % 7, 0, [] if row % 5 == 0 else [-1, 0]) for row in range(300)
    ]
    requests[255] = Request(90, 70, tree(33))
    batch = make_batch(requests, device, num_kv_heads=2, group=1, head_size=16)
    for num_programs in (1, 9):
        batch.check(split=split_among(batch, num_programs))


def test_tiles_of_a_prompt_are_all_computed_once(device: torch.device):
    batch = make_batch([Request(9, 500, [])], device, num_kv_heads=1, group=2)
    for num_programs in (1, 6, 11):
        batch.check(split=split_among(batch, num_programs))


def test_no_program_has_fewer_keys_than_are_worth_it(device: torch.device):
    batch = make_batch([Request(500, 0, [-1])], device, num_kv_heads=1)
    split = split_among(batch, 8)
    batch.check(split=replace(split, min_keys=512))
    num_pieces = split.cuts.view(-1, 4)[:8, 0].tolist()
    assert num_pieces == [0] * 8
    batch.check(split=replace(split, min_keys=128))
    num_pieces = split.cuts.view(-1, 4)[:8, 0].tolist()
    assert num_pieces == [4, *[0] * 7]


def test_work_is_even_whatever_the_lengths(device: torch.device):
    # 32 tiles of keys in all. Four programs have eight each: the long request's 28 are cut
    # three times, and one program has what it leaves and all short ones.
    requests = [Request(64 * 28 - 1, 0, [-1]), *[Request(63, 0, [-1])] * 4]
    batch = make_batch(requests, device, num_kv_heads=1, group=1)
    split = split_among(batch, 4)
    batch.check(split=split, tiles=default_tiles(1, 1, 32, 4)._replace(block_n=64))
    num_pieces = split.cuts.view(-1, 4)[:4, 0].tolist()
    assert num_pieces == [4, 0, 0, 0]


def test_a_part_of_which_a_row_sees_nothing(device: torch.device):
    # Of the tree's words some rows see one only; with a window most rows lose others.
    star = [-1, *[0] * 99]
    batch = make_batch(
        [Request(130, 0, star)], device, num_kv_heads=1, group=1, sliding_window=20
    )
    batch.check(sliding_window=20, split=split_among(batch, 4))
    batch.check(sliding_window=2, split=split_among(batch, 4))


def test_a_row_that_sees_nothing_in_any_part_gives_zeros(device: torch.device):
    batch = make_batch([Request(30, 0, chain(3))], device, sliding_window=1)
    batch.arguments["masks"][0, 1] = 0
    split = split_among(batch, 4)
    output = batch.run(tree_attention, sliding_window=1, split=split)
    assert (output[1] == 0).all()
    assert output.isfinite().all()


def test_padding_stays_untouched_when_split(device: torch.device):
    batch = make_batch(MIXED, device, num_kv_heads=1, num_padding=40)
    split = split_among(batch, 3)
    output = batch.run(tree_attention, split=split)
    assert (output[-40:] == UNTOUCHED).all()
    batch.check(split=split)


def test_scratch_of_a_larger_batch_is_not_taken_for_this_ones(device: torch.device):
    large = make_batch([Request(900, 0, tree(50))] * 3, device)
    split = split_among(large, 9)
    large.check(split=split)
    make_batch(MIXED, device).check(split=split)
    make_batch([Request(0, 0, [])] * 2, device, num_padding=2).check(split=split)


SMALL_TREES = [
    Request(37, 0, SMALL_TREE),
    Request(53, 0, [-1]),  # no tree
    Request(70, 3, tree(9)),  # the first step has rows before the root
    Request(0, 5, []),
    Request(5, 0, chain(12)),
]
LARGE_TREES = [
    Request(40, 0, tree(70)),
    Request(53, 0, [-1]),
    Request(9, 0, chain(33)),
    Request(61, 0, tree(65, seed=1)),
]


@pytest.mark.parametrize(
    "attention", [tree_attention, reference], ids=["triton", "reference"]
)
@pytest.mark.parametrize("requests", [SMALL_TREES, LARGE_TREES], ids=["small", "large"])
@pytest.mark.parametrize(
    ("sliding_window", "soft_cap"), [(None, None), (7, None), (45, 0.3), (2, 30.0)]
)
def test_a_tree_that_grows_sees_what_it_would_see_in_one_go(
    sliding_window: int | None,
    soft_cap: float | None,
    requests: list[Request],
    attention: Any,
    device: torch.device,
):
    gen = torch.Generator().manual_seed(0)
    batch = make_batch(
        requests, device, group=3, sliding_window=sliding_window or 1 << 20
    )
    query_lens = torch.tensor([request.query_len for request in requests])
    # as good as levels: ancestors come first; a request may have no rows in a step
    cuts = (torch.rand(3, len(requests), generator=gen) * (query_lens + 1)).long()
    ends = [*cuts.sort(0).values.tolist(), query_lens.tolist()]
    options = {"sliding_window": sliding_window, "soft_cap": soft_cap}
    torch.testing.assert_close(
        grow(batch, attention, ends, **options),
        batch.run(reference, **options),
        rtol=1e-5,
        atol=2e-6,
    )


@pytest.mark.parametrize(
    "attention", [tree_attention, reference], ids=["triton", "reference"]
)
def test_every_node_may_come_on_its_own(attention: Any, device: torch.device):
    batch = make_batch([Request(30, 0, tree(35))], device, num_kv_heads=1)
    ends = [[num_rows] for num_rows in range(1, 36)]
    grown = grow(batch, attention, ends, sliding_window=4)
    expected = batch.run(reference, sliding_window=4)
    torch.testing.assert_close(grown, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "attention", [tree_attention, reference], ids=["triton", "reference"]
)
def test_the_last_level_finds_its_ancestors_in_the_cache(
    attention: Any, device: torch.device
):
    # SMALL_TREE: of the last level, 3 -- 1 -- 0 and 5 -- 2 -- 0
    batch = make_batch([Request(20, 0, SMALL_TREE)], device)
    values = batch.values[0][:, 0]
    output = grow(batch, attention, [[1], [3], [6]], scale=0.0)
    for node, path in ((0, [20]), (2, [20, 22]), (3, [20, 21, 23]), (5, [20, 22, 25])):
        mean = values[[*range(20), *path]].mean(0)
        torch.testing.assert_close(output[node, 0].cpu(), mean)
    # a window of two keeps the node and its parent, wherever they are stored
    output = grow(batch, attention, [[1], [3], [6]], scale=0.0, sliding_window=2)
    torch.testing.assert_close(output[5, 0].cpu(), values[[22, 25]].mean(0))


def widened(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values as a view of a poisoned buffer, three wider along ``dim``."""
    shape = list(tensor.shape)
    shape[dim] += 3
    wide = tensor.new_full(shape, NAN if tensor.is_floating_point() else STALE)
    return wide.narrow(dim, 2, tensor.shape[dim]).copy_(tensor)


def test_reads_views_of_wider_buffers(device: torch.device):
    batch = make_batch(MIXED, device)

    for name, dim in (
        ("query", 1),
        ("block_table", 1),
        ("depths", 1),
        ("masks", 1),
        ("masks", 2),
    ):
        batch.arguments[name] = widened(batch.arguments[name], dim)
    # Keys and values in memory of their own; a block's tokens outside its heads.
    key_cache = batch.arguments["key_cache"].transpose(1, 2).contiguous()
    batch.arguments["key_cache"] = widened(key_cache, 2).transpose(1, 2)
    batch.arguments["value_cache"] = widened(batch.arguments["value_cache"], 0)
    expected = batch.run(reference)
    output = torch.full((*expected.shape[:2], 40), NAN, device=device)[..., :32]
    batch.arguments["output"] = output
    tree_attention(
        **batch.arguments,
        max_query_len=30,
        scale=32**-0.5,
        sliding_window=None,
        soft_cap=None,
    )
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(5, 3, 32), "output": torch.zeros(5, 3, 32)}, "3 query"),
        ({"output": torch.zeros(5, 4, 16)}, "like the query"),
        ({"value_cache": torch.zeros(1, 2, 16, 64)}, "head size, 32"),
        ({"key_cache": torch.zeros(4, 2, 16, 32).half()}, "one dtype"),
        (
            {
                "key_cache": torch.zeros(4, 2, 16, 32).byte(),
                "value_cache": torch.zeros(4, 2, 16, 32).byte(),
            },
            "view quantized bytes",
        ),
        (
            {
                "key_cache": torch.zeros(4, 2, 16, 32).to(torch.float8_e5m2),
                "value_cache": torch.zeros(4, 2, 16, 32).to(torch.float8_e5m2),
            },
            "pass key_scale and value_scale",
        ),
        ({"sinks": torch.zeros(2)}, "each of 4 query heads"),
        ({"key_scale": torch.ones(2)}, "one element each"),
        ({"masks": torch.zeros(2, 40, 1), "depths": torch.zeros(2, 40)}, "32 in a"),
    ],
)
def test_rejects_shapes_that_do_not_fit(
    changes: dict[str, torch.Tensor], message: str, device: torch.device
):
    batch = make_batch([Request(30, 0, SMALL_TREE)], device)
    changes = {name: tensor.to(device) for name, tensor in changes.items()}
    batch.arguments.update(changes)
    with pytest.raises(ValueError, match=message):
        batch.run(tree_attention)


HOST_BATCHES = {
    "mixed": MIXED,
    "long prompts": [Request(0, 2 * CHUNK + 9, []), Request(40, CHUNK + 1, [])],
    "large tree": [Request(300, 0, tree(70)), Request(0, 0, tree(40))],
}


@pytest.mark.parametrize("requests", HOST_BATCHES.values(), ids=HOST_BATCHES)
@pytest.mark.parametrize("sliding_window", [None, 40, 7, 1])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_on_the_host_matches_the_reference(
    requests: list[Request], sliding_window: int | None, group: int
):
    batch = make_batch(
        requests, CPU, group=group, sliding_window=sliding_window or 1 << 20
    )
    plans: dict[Any, Any] = {}
    expected = batch.run(reference, sliding_window=sliding_window)
    for _ in range(2):  # plans made, and plans read
        output = batch.run(host_attention, sliding_window=sliding_window, plans=plans)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)


def test_layers_with_and_without_a_window_share_plans_of_their_own():
    batch, plans = make_batch(MIXED, CPU), {}
    for sliding_window in (7, None, 7):
        torch.testing.assert_close(
            batch.run(host_attention, sliding_window=sliding_window, plans=plans),
            batch.run(reference, sliding_window=sliding_window),
            rtol=1e-5,
            atol=2e-6,
        )


def test_attention_on_the_host_rounds_once():
    batch = make_batch(MIXED, CPU, dtype=torch.bfloat16)
    exact = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in batch.arguments.items()
    }
    expected = Batch(MIXED, exact, batch.keys, batch.values).run(reference)
    output = batch.run(host_attention)
    torch.testing.assert_close(output.float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("options", [{"soft_cap": 0.3}, {"sinks": torch.ones(4)}])
def test_what_torch_lacks_is_left_to_the_twin(options: dict[str, Any]):
    batch = make_batch(MIXED, CPU)
    expected = batch.run(reference, **options)
    torch.testing.assert_close(batch.run(host_attention, **options), expected)


def test_rejects_strides_and_numbers_out_of_bounds(device: torch.device):
    batch = make_batch([Request(30, 0, SMALL_TREE)], device)
    with pytest.raises(ValueError, match="sliding_window=0: must be at least 1"):
        batch.run(tree_attention, sliding_window=0)
    with pytest.raises(ValueError, match=r"soft_cap=-1\.0: must be positive"):
        batch.run(tree_attention, soft_cap=-1.0)
    query = batch.arguments["query"]
    batch.arguments["query"] = query.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="query has last stride 4, must be 1"):
        batch.run(tree_attention)


def test_rejects_heads_wider_than_a_tile(device: torch.device):
    batch = make_batch([Request(3, 0, [-1])], device, head_size=257)
    with pytest.raises(ValueError, match=r"head_size=257: must be in \[1, 256\]"):
        batch.run(tree_attention)
