"""Tokens per second of trees, of vLLM's own chains and of no speculation.

    python benchmarks/bench_serving.py [--size 8B] [--minutes 4] [--small]

Every method is an engine of its own around the same weights, and they take turns: each
round is all methods in each setting, one after another, on the same prompts. First the
greedy text of all of them is held against the small target in float32.

Without a GPU everything is a miniature and only ratios are shown; --small is the smallest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from inflated_engine import (
    ON_CPU,
    PROMPT_LEN,
    RESULTS,
    SIZES,
    TIE,
    Models,
    Run,
    decode,
    forget,
    header,
    held_out_prompts,
    start,
    worst_choice,
)
from vllm.utils.import_utils import has_arctic_inference

from vllm_treespec.testing.bench import print_table

NONE = "none"
SUFFIX = "suffix in V1"
# Of vLLM. On a CPU, V1 does with torch what V2 does by interpreted Triton kernels.
CHAINS = ("ngram", "draft_model") if ON_CPU else ("ngram", "draft_model", SUFFIX)
WARM_UP = 4  # tokens
# Of each engine, in bytes: 64 requests of 256 tokens in an 8B and a 1B model take 2.5 GiB.
KV_CACHE = 2**26 if ON_CPU else 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured."""

    batches: tuple[int, ...] = (1, 4, 16, 64)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    chains: tuple[int, ...] = (2, 4, 8)
    num_nodes: int = 31  # with the root, 32 rows: one tile of 128 with groups of 4
    depth: int = 6
    width: int = 8
    num_tokens: int = 128
    num_prompts: int = 4  # at least, in several batches if they are smaller
    max_rounds: int = 10


MINIATURE = Extent(
    batches=(1, 4),
    chains=(2, 4),
    num_nodes=8,
    depth=3,
    width=2,
    num_tokens=16,
    num_prompts=2,
    max_rounds=3,
)
SMALL = replace(MINIATURE, batches=(2,), chains=(2,), num_tokens=12, max_rounds=1)


def methods(models: Models, extent: Extent) -> dict[str, dict[str, Any] | None]:
    """Name -> vLLM's speculative_config, None for no speculation."""
    draft = str(models.path("draft"))
    grown = {"depth": extent.depth, "width": extent.width}
    draft_model = {"type": "draft_model", "model": draft, **grown}
    suffix = {"type": "suffix"}
    trees = {
        "draft_model": [draft_model],
        "draft_model+suffix": [draft_model, suffix],
        "suffix": [suffix],
    }
    return {
        NONE: None,
        "ngram, 4": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 5,
        },
        **{
            f"draft_model, {length}": {
                "method": "draft_model",
                "model": draft,
                "num_speculative_tokens": length,
                # Accepts more than the default where text is sampled, but its kernel
                # calls libdevice, which Triton's interpreter does not have.
                "draft_sample_method": "greedy" if ON_CPU else "probabilistic",
            }
            for length in extent.chains
        },
        **(
            {
                f"{SUFFIX}, {extent.num_nodes}": {
                    "method": "suffix",
                    "num_speculative_tokens": extent.num_nodes,
                }
            }
            if has_arctic_inference()
            else {}
        ),
        **{
            f"treespec {name}, {extent.num_nodes}": {
                "method": "treespec",
                "num_speculative_tokens": extent.num_nodes,
                # An interpreter's times would put proposers to rest.
                "tree": {"proposers": proposers, "adaptive": not ON_CPU},
            }
            for name, proposers in trees.items()
        },
    }


class Check(NamedTuple):
    batch: int
    method: str
    same_text_as_none: str
    worst_choice: str


class Row(NamedTuple):
    T: float
    batch: int
    method: str
    tokens_per_step: float
    tokens_per_s: float
    ms_per_token: float
    speed_up: str  # tokens per second over those of no speculation
    speed_up_over_chains: float


class Ratios(NamedTuple):
    """As much of a row as a CPU may say."""

    T: float
    batch: int
    method: str
    tokens_per_step: float
    speed_up: str
    speed_up_over_chains: float


# (temperature, batch, method) -> a run of each round
Runs = dict[tuple[float, int, str], list[Run]]


class Bench:
    """All engines, and the prompts of every batch size."""

    def __init__(self, models: Models, extent: Extent) -> None:
        self.extent = extent
        self.engines = {}
        for name, speculative in methods(models, extent).items():
            begin = time.perf_counter()
            self.engines[name] = start(
                models,
                speculative,
                max_num_seqs=max(extent.batches),
                max_model_len=256 if ON_CPU else 1024,
                kv_cache_bytes=KV_CACHE,
            )
            progress(f"{name}: started in {time.perf_counter() - begin:.0f} s")
        self._prompts = held_out_prompts(max(*extent.batches, extent.num_prompts))

    def prompts(self, batch: int) -> list[list[int]]:
        return self._prompts[: max(batch, self.extent.num_prompts)]

    def run(self, method: str, batch: int, temperature: float, num_tokens: int) -> Run:
        """All prompts, so many at a time, by an engine that has read none of them."""
        llm, prompts = self.engines[method], self.prompts(batch)
        forget(llm)
        runs = [
            decode(
                llm,
                prompts[first : first + batch],
                temperature=temperature,
                num_tokens=num_tokens,
            )
            for first in range(0, len(prompts), batch)
        ]
        return Run(
            [text for run in runs for text in run.texts],
            sum(run.seconds for run in runs),
            sum(run.num_decoded for run in runs),
            sum(run.num_steps for run in runs),
            [each for run in runs for each in run.decoding],
        )

    def settings(self) -> Iterator[tuple[float, int]]:
        return product(self.extent.temperatures, self.extent.batches)

    def check(self) -> list[Check]:
        """Greedy text of all methods, which warms them up as well."""
        rows = []
        for batch in self.extent.batches:
            prompts, num_tokens = self.prompts(batch), self.extent.num_tokens
            said = {
                name: self.run(name, batch, 0.0, num_tokens).texts
                for name in self.engines
            }
            plain = said[NONE]
            for name, texts in said.items():
                same = f"{sum(map(list.__eq__, texts, plain))} of {len(plain)}"
                worst = worst_choice(prompts, texts)
                rows.append(Check(batch, name, same, f"{worst:.4f}"))
                if worst > TIE:
                    raise SystemExit(f"not what the target says: {rows[-1]}, > {TIE}")
        for name in self.engines:  # the first sampled steps compile
            self.run(name, 1, 1.0, num_tokens=WARM_UP)
        return rows

    def rounds(self, deadline: float) -> Iterator[Runs]:
        """All that was measured so far, after each whole round; one at least."""
        runs: Runs = {}
        for number in range(self.extent.max_rounds):
            begin = time.monotonic()
            for temperature, batch in self.settings():
                for name in self.engines:
                    run = self.run(name, batch, temperature, self.extent.num_tokens)
                    runs.setdefault((temperature, batch, name), []).append(run)
            seconds = time.monotonic() - begin
            progress(f"round {number + 1} took {seconds:.0f} s")
            yield runs
            if time.monotonic() + seconds > deadline:
                break


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def speeds(runs: list[Run]) -> list[float]:
    """Tokens per second of each round, prefill included."""
    return [sum(map(len, run.texts)) / run.seconds for run in runs]


def rows_of(runs: Runs) -> list[Row]:
    rows = []
    for (temperature, batch, name), rounds in runs.items():
        alike = {
            key[2]: each
            for key, each in runs.items()
            if key[:2] == (temperature, batch)
        }
        ours, plain = speeds(rounds), speeds(alike[NONE])
        ratios = [mine / theirs for mine, theirs in zip(ours, plain, strict=True)]
        chain = max(
            median(speeds(each))
            for other, each in alike.items()
            if other.startswith(CHAINS)
        )
        num_steps = sum(run.num_steps for run in rounds)
        rows.append(
            Row(
                temperature,
                batch,
                name,
                sum(run.num_decoded for run in rounds) / num_steps,
                median(ours),
                1e3 * median(mean(run.decoding) for run in rounds),
                f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                median(ours) / chain,
            )
        )
    return rows


def ratios_of(rows: list[Row]) -> list[Ratios]:
    ratios = [Ratios(*(getattr(row, name) for name in Ratios._fields)) for row in rows]
    return [
        row._replace(speed_up="-", speed_up_over_chains=math.nan)
        if row.method.startswith(SUFFIX)
        else row
        for row in ratios
    ]


NOTES = """\
Target and draft are the bundled pair, inflated (size: {size}): text and acceptance are
theirs, the cost is the large shapes'. The draft's first choice is the target's in 45% of
all places, less than usual; but greedy text soon repeats itself, more than usual.

Prompts are {prompt_len} tokens of held-out files, answers {num_tokens} tokens; a number behind a
method's name is its drafts per step. Engines run in this process, whole steps in CUDA
graphs where there is a GPU, without torch.compile, and share the models' memory. They
take turns and forget what they have read before each; rounds of all settings: {num_rounds}.

tokens_per_step: what a request gets from a forward pass of the target that it takes part
in. tokens_per_s: of all requests, prefill included. ms_per_token: between a request's
tokens, on average. speed_up: over no speculation in the same round, median and range.
speed_up_over_chains: over vLLM's best one in this setting.

Everything here runs in vLLM's Model Runner V2, except its own `suffix`, which only V1
has and which drafts as many tokens as it finds likely, {num_nodes} at most:
{suffix}. Without torch.compile,
steps in which requests have different numbers of drafts run without graphs: those of
vLLM's ngram and suffix.

worst_choice: how far the least likely token of any answer was behind the likeliest, in
logits of the small target in float32; {tie} is allowed for rounding.
"""


SUFFIX_NOTE = (
    "it needs the package arctic-inference, and without it is missing"
    if not has_arctic_inference()
    else "on a CPU its times are another runner's and compare with nothing"
    if ON_CPU
    else "some of its speed-up, or of its loss, is the runner's"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="8B", help="of the models")
    parser.add_argument("--minutes", type=float, default=4.0, help="of rounds")
    parser.add_argument("--small", action="store_true", help="the least there is")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.md")
    options = parser.parse_args()
    extent = SMALL if options.small else MINIATURE if ON_CPU else Extent()
    size = "miniature" if options.small or ON_CPU else options.size
    bench = Bench(Models(size), extent)
    checks = bench.check()
    for runs in bench.rounds(time.monotonic() + 60 * options.minutes):
        # After each round: whoever is stopped has a table.
        tables = tables_of(checks, rows_of(runs))
        num_rounds = len(next(iter(runs.values())))
        notes = NOTES.format(
            size=size,
            prompt_len=PROMPT_LEN,
            num_tokens=extent.num_tokens,
            num_rounds=num_rounds,
            num_nodes=extent.num_nodes,
            suffix=SUFFIX_NOTE,
            tie=TIE,
        )
        command = " ".join(["python benchmarks/bench_serving.py", *sys.argv[1:]])
        options.out.write_text(header("Serving", command) + notes + tables)
    print(tables)


def tables_of(checks: list[Check], rows: list[Row]) -> str:
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        print_table("Greedy text, before any time", checks)
        print_table("Serving", ratios_of(rows) if ON_CPU else rows)
    return written.getvalue()


if __name__ == "__main__":
    main()
