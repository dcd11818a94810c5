"""python benchmarks/model_gpu.py [--write]

A model, not a measurement: what a decode step takes on a GPU, from bytes, tiles, launches
and published rates. Every number it is made of is a constant below, with where it is from,
to be replaced by a measured one.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
RESULT = HERE / "results/model_gpu.md"
MAX_ROWS, MAX_NODES = 256, 31  # tree.max_rows, num_speculative_tokens


@dataclass(frozen=True, slots=True)
class Gpu:
    """NVIDIA's data sheets (SXM)."""

    name: str
    num_sms: int
    bytes_per_second: float
    flops_per_second: float  # dense bfloat16
    memory: float


GPUS = (
    Gpu("H100", 132, 3.35e12, 989e12, 80e9),
    Gpu("H200", 132, 4.8e12, 989e12, 141e9),
)


@dataclass(frozen=True, slots=True)
class Model:
    """Read in every step: all weights but the embedding, in bfloat16."""

    num_parameters: float
    num_layers: int
    num_kv_heads: int
    head_size: int

    @property
    def kv_bytes(self) -> int:
        """Of a token."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_size


TARGET = Model(7.5e9, 32, 8, 128)  # Llama 3.1 8B
DRAFT = Model(1.24e9, 16, 8, 64)  # Llama 3.2 1B; its head is its embedding

# What kernels reach of the data sheet: of bandwidth, of FLOPs in matrix products.
BANDWIDTH, COMPUTE = 0.85, 0.6
FLASH_BANDWIDTH = 0.88  # FlashAttention 3 on long contexts
LAUNCH_US = 2.5  # of a small kernel in a stream that is full
LAYER_US = 5.0  # of attention, whatever it reads
# A tile of 64 keys: what is waited for its load, with one tile on its way and with two, and
# what 128 rows of QK, softmax and PV take; from data sheets and compiled code.
TILE_KEYS, TILE_ROWS, GROUP = 64, 128, 4
SERIAL_LOAD_US, PIPELINED_LOAD_US, TILE_US = 1.0, 0.4, 1.1
# The host while the device waits for it: scheduling, inputs, launches. Without proposers on
# the host, async scheduling hides it.
HOST_MS = 2.0
SUFFIX_MS = {1: 0.10, 8: 0.28, 64: 1.8}  # of the proposer itself, measured on a CPU
# Small kernels a step, as `docs/benchmarks.md` counts them.
AROUND, RECYCLE, RECYCLE_BEFORE = 10, 8, 754
LEVEL = 36  # of a draft tree, around its forward
DRAFT_DEPTH, DRAFT_WIDTH, CHAIN = 6, 8, 4


class Cut(NamedTuple):
    """How our attention kernel runs."""

    load_us: float  # waited for at each tile
    is_balanced: bool  # tiles of all requests are divided evenly


BEFORE = Cut(SERIAL_LOAD_US, is_balanced=False)
NOW = Cut(PIPELINED_LOAD_US, is_balanced=True)


def forward_ms(gpu: Gpu, model: Model, num_rows: int) -> float:
    """Everything but attention."""
    read = 2 * model.num_parameters / (BANDWIDTH * gpu.bytes_per_second)
    computed = 2 * model.num_parameters * num_rows / (COMPUTE * gpu.flops_per_second)
    return 1e3 * max(read, computed)


def flash_ms(gpu: Gpu, model: Model, num_reqs: int, context: int) -> float:
    """FlashAttention over few rows a request reads every key once."""
    kv_bytes = num_reqs * context * model.kv_bytes
    read = kv_bytes / (FLASH_BANDWIDTH * gpu.bytes_per_second)
    return 1e3 * read + 1e-3 * LAYER_US * model.num_layers


def nodes_of(num_reqs: int) -> int:
    return min(MAX_NODES, MAX_ROWS // num_reqs - 1)


def tree_ms(gpu: Gpu, model: Model, num_reqs: int, context: int, cut: Cut) -> float:
    """One program of at most 128 rows a multiprocessor."""
    rows = min(TILE_ROWS, GROUP * (1 + nodes_of(num_reqs)))
    tile_us = cut.load_us + TILE_US * rows / TILE_ROWS
    tiles = -(-context // TILE_KEYS)
    units = num_reqs * model.num_kv_heads
    if cut.is_balanced:
        turns = units * tiles / gpu.num_sms + 1  # and what two programs share
    else:
        segments = max(1, min(2 * gpu.num_sms // units, tiles))
        waves = -(-units * segments // gpu.num_sms)
        turns = waves * -(-tiles // segments)
    layer_us = max(
        turns * tile_us,
        1e6
        * units
        * tiles
        * TILE_KEYS
        * 4
        * model.head_size
        / (BANDWIDTH * gpu.bytes_per_second),
    )
    return 1e-3 * model.num_layers * (layer_us + LAYER_US)


def suffix_ms(num_reqs: int) -> float:
    """Between two sizes that were measured it grows evenly."""
    sizes = sorted(SUFFIX_MS)
    for low, high in itertools.pairwise(sizes):
        if num_reqs <= high:
            part = (num_reqs - low) / (high - low)
            return SUFFIX_MS[low] + part * (SUFFIX_MS[high] - SUFFIX_MS[low])
    return SUFFIX_MS[sizes[-1]] * num_reqs / sizes[-1]


class Row(NamedTuple):
    """Milliseconds of a step; a step without speculation makes one token."""

    gpu: str
    requests: int
    context: int
    plain: float
    chain_ngram: float
    chain_draft: float
    suffix: float
    recycle: float
    draft_tree: float

    def break_even(self) -> dict[str, float]:
        """Tokens per step from which each is faster than no speculation."""
        return {name: getattr(self, name) / self.plain for name in self._fields[4:]}


def row_of(gpu: Gpu, num_reqs: int, context: int, cut: Cut) -> Row:
    nodes = nodes_of(num_reqs)
    flash = flash_ms(gpu, TARGET, num_reqs, context)
    small = 1e-3 * LAUNCH_US

    def chain(num_tokens: int) -> float:
        return forward_ms(gpu, TARGET, num_reqs * (1 + num_tokens)) + flash

    def drafted(width: int) -> float:
        """A forward of the draft."""
        attention = flash_ms(gpu, DRAFT, num_reqs, context)
        return forward_ms(gpu, DRAFT, num_reqs * width) + attention

    tree = forward_ms(gpu, TARGET, num_reqs * (1 + nodes)) + AROUND * small
    tree += tree_ms(gpu, TARGET, num_reqs, context, cut)
    recycle = RECYCLE if cut == NOW else RECYCLE_BEFORE
    return Row(
        gpu.name,
        num_reqs,
        context,
        plain=forward_ms(gpu, TARGET, num_reqs) + flash,
        chain_ngram=chain(8) + HOST_MS,
        chain_draft=chain(CHAIN) + CHAIN * drafted(1),
        suffix=tree + HOST_MS + suffix_ms(num_reqs),
        recycle=tree + recycle * small,
        draft_tree=tree + DRAFT_DEPTH * (drafted(DRAFT_WIDTH) + LEVEL * small),
    )


def rows(cut: Cut) -> Iterator[Row]:
    for gpu in GPUS:
        for num_reqs in (1, 4, 8, 16, 32, 64):
            for context in (1024, 4096, 8192, 32768):
                held = 2 * TARGET.num_parameters + num_reqs * context * TARGET.kv_bytes
                if held < 0.9 * gpu.memory:
                    yield row_of(gpu, num_reqs, context, cut)


def table(cut: Cut) -> str:
    names = Row._fields[3:]
    lines = [
        "| GPU | requests | context | "
        + " | ".join(f"{name.replace('_', ' ')}, ms" for name in names)
        + " | break-even: ngram | chain draft | suffix | recycle | draft tree |",
        "| --- |" + " ---: |" * (len(names) + 7),
    ]
    for row in rows(cut):
        cells = [row.gpu, str(row.requests), str(row.context)]
        cells += [f"{value:.1f}" for value in row[3:]]
        cells += [f"{value:.2f}" for value in row.break_even().values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report() -> str:
    ratios = [
        [
            tree_ms(gpu, TARGET, num_reqs, context, cut)
            / flash_ms(gpu, TARGET, num_reqs, context)
            for cut in (BEFORE, NOW)
        ]
        for gpu, num_reqs, context in ((GPUS[0], 8, 4096), (GPUS[1], 8, 4096))
    ]
    return f"""# A model of decode steps on GPUs

```
python benchmarks/model_gpu.py --write
```

**A model, not a measurement.** Llama 3.1 8B and 1B shapes in bfloat16; trees of at most
{MAX_NODES} nodes within {MAX_ROWS} rows; chains are vLLM's, of 8 tokens by n-gram and of
{CHAIN} by the 1B draft; the draft's tree is {DRAFT_DEPTH} deep and {DRAFT_WIDTH} wide. A
break-even is the tokens per step from which a way of drafting is faster than none. What the
model is made of stands in the script. It knows nothing of mixed prefills, of contexts of
different lengths or of the rest of vLLM; where keys do not fit, there is no row.

Attention to 8 x 4096 keys, against FlashAttention 3 on a chain: {ratios[0][0]:.2f} before and
{ratios[0][1]:.2f} now on H100, {ratios[1][0]:.2f} and {ratios[1][1]:.2f} on H200.

## One tile in flight, cut by request; recycle as torch operations

{table(BEFORE)}

## Two tiles in flight, cut evenly; recycle as kernels

{table(NOW)}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help=f"to {RESULT.name}")
    text = report()
    print(text)
    if parser.parse_args().write:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
