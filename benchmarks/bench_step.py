"""Where the time of a decode step goes, with trees of a draft model and the text so far.

    python benchmarks/bench_step.py [--size 8B] [--small]

One engine, its own timers (those of `vllm:treespec_phase_seconds` and
`vllm:treespec_draft_seconds`), some more around parts that they do not tell apart, and
torch.profiler for the operators. First its greedy text is held against the small target
in float32. Without a GPU, and with --small, everything is a miniature.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import torch
from inflated_engine import (
    DEVICE,
    ON_CPU,
    PROMPT_LEN,
    RESULTS,
    SIZES,
    TIE,
    Models,
    decode,
    forget,
    header,
    held_out_prompts,
    model_runner,
    start,
    worst_choice,
)
from torch.profiler import ProfilerActivity, profile
from vllm import LLM, SamplingParams

from vllm_treespec.integration.metrics import PHASES
from vllm_treespec.integration.stopwatch import Stopwatch
from vllm_treespec.testing.bench import print_table

DEPTH, WIDTH, NUM_NODES = (3, 2, 8) if ON_CPU else (6, 8, 31)
BATCHES = (1, 4) if ON_CPU else (1, 4, 16, 64)
NUM_TOKENS = 24 if ON_CPU else 128  # of the text that is checked
NUM_STEPS = 8 if ON_CPU else 32  # that are timed
NUM_PROFILED = 2 if ON_CPU else 8
NUM_OPERATORS = 12
MAX_LEN = 256 if ON_CPU else 2048  # greedy text repeats itself, and grows fast
MODEL, SAMPLE, FORWARD, CATCH_UP, GROW = range(5)


class Part(NamedTuple):
    batch: int
    part: str
    ms_per_step: float
    share: str


class Share(NamedTuple):
    batch: int
    part: str
    share: str


class Operator(NamedTuple):
    operator: str
    calls_per_step: float
    us_per_step: float
    share: str


class Timers:
    """Laps around the parts of a started engine; on a GPU of its stream."""

    def __init__(self, llm: LLM) -> None:
        runner = model_runner(llm)
        self._speculator = runner.speculator
        self._laps = Stopwatch(5, DEVICE)
        (draft,) = self._speculator.drafts.models.values()
        self._wrap(runner, "execute_model", MODEL)
        self._wrap(runner, "sample_tokens", SAMPLE)
        self._wrap(runner.model, "forward", FORWARD)
        if runner.cudagraph_manager is not None:
            self._wrap(runner.cudagraph_manager, "run_fullgraph", FORWARD)
        self._wrap(draft, "catch_up", CATCH_UP)
        self._wrap(draft, "propose", GROW)

    def _wrap(self, owner: Any, name: str, lap: int) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            with self._laps.measure(lap):
                return original(*args, **options)

        setattr(owner, name, timed)

    def read(self) -> dict[str, float]:
        """Seconds so far, of parts of which none is inside another."""
        if not ON_CPU:
            torch.cuda.synchronize()
        model, sample, forward, catch_up, grow = self._laps.seconds()
        phases = dict(zip(PHASES, self._speculator.phases.seconds(), strict=True))
        suffix = self._speculator._worth.stopwatch.seconds()[-1]
        known = sum(phases.values()) + suffix + catch_up + grow
        return {
            "target: inputs": model - forward,
            "target: forward": forward,
            "verify": phases["verify"],
            "commit": phases["commit"],
            "draft_model: catches up": catch_up,
            f"draft_model: {DEPTH} levels": grow,
            "suffix": suffix,
            "build": phases["build"],
            "logits, bookkeeping": sample - known,
            "scheduler, outputs, gaps": -model - sample,  # the rest of all time
        }


def first_tokens(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Add the prompts, and step until every request is decoding; returns their names."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=MAX_LEN - PROMPT_LEN,
        ignore_eos=True,
        detokenize=False,
    )
    names = [f"{row} of {len(prompts)}" for row in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        llm.llm_engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
    waiting = set(names)
    while waiting:
        outputs = llm.llm_engine.step()
        waiting -= {each.request_id for each in outputs if each.outputs[0].token_ids}
    return names


def timed_steps(llm: LLM, timers: Timers, batch: int) -> list[Part]:
    """Of requests that all decode."""
    before, begin = timers.read(), time.perf_counter()
    for _ in range(NUM_STEPS):
        llm.llm_engine.step()
    after, total = timers.read(), time.perf_counter() - begin
    seconds = {part: after[part] - before[part] for part in after}
    seconds["scheduler, outputs, gaps"] += total
    rows = [("all", total), *seconds.items()]
    return [
        Part(batch, part, 1e3 * each / NUM_STEPS, f"{each / total:.1%}")
        for part, each in rows
    ]


def profiled_steps(llm: LLM) -> list[Operator]:
    """The operators with the most time of their own, kernels on a GPU."""
    activities = [ProfilerActivity.CPU if ON_CPU else ProfilerActivity.CUDA]
    begin = time.perf_counter()
    with profile(activities=activities) as profiler:
        for _ in range(NUM_PROFILED):
            llm.llm_engine.step()
        if not ON_CPU:
            torch.cuda.synchronize()
    total_us = 1e6 * (time.perf_counter() - begin)
    field = f"self_{DEVICE.type.replace('cuda', 'device')}_time_total"
    found = [(getattr(each, field), each) for each in profiler.key_averages()]
    found.sort(key=lambda pair: -pair[0])
    busy = sum(us for us, _ in found)
    rows = [
        Operator(
            each.key[:60].replace("|", "/"),
            each.count / NUM_PROFILED,
            us / NUM_PROFILED,
            f"{us / total_us:.1%}",
        )
        for us, each in found[:NUM_OPERATORS]
    ]
    num_calls = sum(each.count for _, each in found) / NUM_PROFILED
    return [
        Operator("all", num_calls, busy / NUM_PROFILED, f"{busy / total_us:.1%}"),
        *rows,
    ]


def stop(llm: LLM, names: list[str]) -> None:
    assert llm.llm_engine.get_num_unfinished_requests() == len(names), "ended too soon"
    llm.llm_engine.abort_request(names)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def start_engine(models: Models) -> LLM:
    draft = {"type": "draft_model", "model": str(models.path("draft"))}
    proposers = [{**draft, "depth": DEPTH, "width": WIDTH}, {"type": "suffix"}]
    speculative = {
        "method": "treespec",
        "num_speculative_tokens": NUM_NODES,
        # Every step is to have all its parts.
        "tree": {"proposers": proposers, "adaptive": False},
    }
    return start(
        models,
        speculative,
        max_num_seqs=max(BATCHES),
        max_model_len=MAX_LEN,
        kv_cache_bytes=2**26 if ON_CPU else 24 * 2**30,
    )


NOTES = """\
Models of size {size}, see serving.md; trees of {nodes} nodes from the draft model (depth
{depth}, width {width}) and suffix, greedy, {prompt_len}-token prompts, the mean of {steps}
steps in which all requests decode. Before, the engine said {tokens} tokens to each of
{prompts} prompts, of which the least likely was {worst:.4f} behind the small target's own
choice in logits ({tie} is allowed for rounding).

On a GPU, times are those between events on its stream, so a part has the stream's waits
for the host in it, and suffix is the host's own time, beside the others. Outside of them
are vLLM's scheduler and output processing, and gaps between steps.
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="8B", help="of the models")
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.md")
    options = parser.parse_args()
    size = "miniature" if options.small or ON_CPU else options.size
    llm = start_engine(Models(size))
    prompts = held_out_prompts(max(BATCHES))
    run = decode(llm, prompts, temperature=0.0, num_tokens=NUM_TOKENS)
    if (worst := worst_choice(prompts, run.texts)) > TIE:
        raise SystemExit(f"not what the target says: {worst} > {TIE}")
    timers, parts, operators = Timers(llm), [], {}
    for batch in BATCHES:
        forget(llm)
        names = first_tokens(llm, prompts[:batch])
        parts += timed_steps(llm, timers, batch)
        operators[batch] = profiled_steps(llm)
        stop(llm, names)
    notes = NOTES.format(
        size=size,
        nodes=NUM_NODES,
        depth=DEPTH,
        width=WIDTH,
        prompt_len=PROMPT_LEN,
        steps=NUM_STEPS,
        tokens=NUM_TOKENS,
        prompts=len(prompts),
        worst=worst,
        tie=TIE,
    )
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        shares = [Share(part.batch, part.part, part.share) for part in parts]
        print_table("Parts of a step", shares if ON_CPU else parts)
        if not ON_CPU:
            for batch, rows in operators.items():
                print_table(f"Kernels, batch {batch}; share of all time", rows)
    print(written.getvalue())
    command = " ".join(["python benchmarks/bench_step.py", *sys.argv[1:]])
    options.out.write_text(
        header("A decode step", command) + notes + written.getvalue()
    )


if __name__ == "__main__":
    main()
