"""SmolLM2-135M-Instruct on Spec-Bench: trees, vLLM's own chains, no speculation.

    python benchmarks/bench_real.py [--per-category 1] [--tokens 48] [--small]

Every engine is a process of its own. They take turns question by question, so what else
the machine does disturbs all of them alike, and forget what they have read before each
batch. Times are those of decoding, behind each request's first token; CPU seconds stand
beside the wall clock's, which on a busy machine says little.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import contextlib
import io
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import torch
from fetch import fetch
from inflated_engine import RESULTS, forget
from questions import sample
from transformers import AutoTokenizer, LlamaForCausalLM

from vllm_treespec.testing.bench import machine, print_table

NODES = (7, 15, 31)
PROPOSERS: dict[str, list[dict[str, Any]]] = {
    "suffix": [{"type": "suffix"}],
    "ngram": [{"type": "ngram"}],
    "recycle": [{"type": "recycle"}],
    "suffix+recycle": [{"type": "suffix"}, {"type": "recycle"}],
    "layer_skip": [{"type": "layer_skip"}],
}
PLAIN, CHAIN, OURS = "none", "vLLM", "trees"
MAX_MODEL_LEN = 2048
# Logits that rounding may reorder: one step of bfloat16 at their size, or float32's.
TIES = {"float32": 1e-3, "bfloat16": 0.25}


@dataclass(frozen=True)
class Method:
    """An engine, and the most nodes that its requests ask for."""

    name: str
    engine: str
    num_nodes: int | None = None


@dataclass(frozen=True)
class Engine:
    model_runner: str  # vLLM's VLLM_USE_V2_MODEL_RUNNER
    speculative: dict[str, Any] | None


def engines() -> dict[str, Engine]:
    lookup = {"prompt_lookup_min": 2, "prompt_lookup_max": 5}
    chains = {
        f"{CHAIN} ngram, {length}": Engine(
            "0", {"method": "ngram", "num_speculative_tokens": length, **lookup}
        )
        for length in (2, 4, 8)
    }
    trees = {
        f"{OURS} {name}": Engine(
            "1",
            {
                "method": "treespec",
                "num_speculative_tokens": max(NODES),
                "tree": {"proposers": proposers},
            },
        )
        for name, proposers in PROPOSERS.items()
    }
    suffix = {"method": "suffix", "num_speculative_tokens": 24}
    return {
        f"{PLAIN}, V1": Engine("0", None),
        f"{PLAIN}, V2": Engine("1", None),
        **chains,
        f"{CHAIN} suffix, 24": Engine("0", suffix),
        **trees,
    }


def methods(names: Sequence[str]) -> list[Method]:
    return [
        Method(f"{name}, {nodes}", name, nodes) if nodes else Method(name, name)
        for name in names
        for nodes in (NODES if name.startswith(OURS) else (None,))
    ]


@dataclass
class Run:
    """What an engine said to prompts that it got at once, and what it cost."""

    texts: list[list[int]] = field(default_factory=list)
    num_tokens: int = 0  # behind the first of each request
    num_turns: int = 0  # steps that a request took part in for them, of all requests
    num_steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    def __add__(self, other: Run) -> Run:
        return Run(
            self.texts + other.texts,
            self.num_tokens + other.num_tokens,
            self.num_turns + other.num_turns,
            self.num_steps + other.num_steps,
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.peak_bytes, other.peak_bytes),
        )


class Order(NamedTuple):
    """What an engine is asked for."""

    prompts: list[list[int]]
    temperature: float
    num_tokens: int
    num_nodes: int | None


def serve(pipe: Any, model: str, dtype: str, engine: Engine) -> None:
    """A process with one engine: orders in, runs out."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = engine.model_runner
    from vllm import LLM, envs

    envs.disable_envs_cache()
    llm = LLM(
        model=model,
        speculative_config=engine.speculative,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=4,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=2**29,
        # The questions are read once; what they cost then is the same for all.
        enable_prefix_caching=True,
        distributed_executor_backend="uni",
        use_tqdm_on_load=False,
    )
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        pipe.send(decode(llm, order))


def decode(llm: Any, order: Order) -> Run:
    from vllm import SamplingParams

    forget(llm)
    nodes = {"treespec_max_nodes": order.num_nodes} if order.num_nodes else None
    params = SamplingParams(
        temperature=order.temperature,
        max_tokens=order.num_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=nodes,
    )
    engine, said = llm.llm_engine, dict[str, list[int]]()
    for row, prompt in enumerate(order.prompts):
        said[str(row)] = []
        engine.add_request(str(row), {"prompt_token_ids": prompt}, params)
    run = Run()
    while engine.has_unfinished_requests():
        begin, cpu = time.perf_counter(), time.process_time()
        outputs = engine.step()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        # A step that reads a prompt is not one of decoding.
        decoding = all(said.values())
        for output in outputs:
            text = list(output.outputs[0].token_ids)
            if decoding:
                run.num_tokens += len(text) - len(said[output.request_id])
                run.num_turns += 1
            said[output.request_id] = text
        if decoding:
            run.seconds, run.cpu_seconds = run.seconds + seconds, run.cpu_seconds + cpu
            run.num_steps += 1
    run.texts = list(said.values())
    run.peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return run


class Bench:
    """All engines' processes, and the questions."""

    def __init__(self, model: str, dtype: str, names: Sequence[str]) -> None:
        context = multiprocessing.get_context("fork")  # what is imported is shared
        known, self.pipes = engines(), dict[str, Any]()
        for name in names:
            ours, theirs = context.Pipe()
            arguments = theirs, model, dtype, known[name]
            context.Process(target=serve, args=arguments, daemon=True).start()
            begin = time.perf_counter()
            if ours.recv() == "ready":
                self.pipes[name] = ours
            progress(f"{name}: started in {time.perf_counter() - begin:.0f} s")
        self.methods = methods(list(self.pipes))

    def ask(self, method: Method, order: Order) -> Run:
        pipe = self.pipes[method.engine]
        pipe.send(order._replace(num_nodes=method.num_nodes))
        run: Run = pipe.recv()
        return run

    def measure(
        self, prompts: list[list[int]], batch: int, temperature: float, num_tokens: int
    ) -> dict[str, Run]:
        """All methods' runs over all prompts, so many prompts at a time."""
        runs = {method.name: Run() for method in self.methods}
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            order = Order(some, temperature, num_tokens, None)
            for method in self.methods:
                runs[method.name] += self.ask(method, order)
        return runs


class Row(NamedTuple):
    T: float
    batch: int
    method: str
    tokens_per_step: float
    ms_per_step: float
    cpu_ms_per_step: float
    tokens_per_s: float
    tokens_per_cpu_s: float
    over_plain: float  # of tokens per CPU second, the faster run without speculation's
    over_chains: float  # of vLLM's best one's
    over_plain_wall: float
    peak_gb: float


def rows_of(temperature: float, batch: int, runs: dict[str, Run]) -> list[Row]:
    def best(start: str, seconds: str) -> float:
        speeds = (
            run.num_tokens / getattr(run, seconds)
            for name, run in runs.items()
            if name.startswith(start)
        )
        return max(speeds, default=math.nan)

    return [
        Row(
            temperature,
            batch,
            name,
            run.num_tokens / run.num_turns,
            1e3 * run.seconds / run.num_steps,
            1e3 * run.cpu_seconds / run.num_steps,
            run.num_tokens / run.seconds,
            run.num_tokens / run.cpu_seconds,
            run.num_tokens / run.cpu_seconds / best(PLAIN, "cpu_seconds"),
            run.num_tokens / run.cpu_seconds / best(CHAIN, "cpu_seconds"),
            run.num_tokens / run.seconds / best(PLAIN, "seconds"),
            run.peak_bytes / 1e9,
        )
        for name, run in runs.items()
    ]


class Difference(NamedTuple):
    method: str
    compared: int  # tokens, up to the first difference of each answer
    differences: int
    per_1000: float
    worst_gap: float  # logits between the two tokens, in float32


@torch.inference_mode()
def differences(
    model: str, prompts: list[list[int]], runs: dict[str, Run]
) -> list[Difference]:
    """Where greedy texts leave that of no speculation in the same model runner."""
    exact, rows = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32), []
    for name, run in runs.items():
        plain = runs.get(f"{PLAIN}, {'V2' if name.startswith(OURS) else 'V1'}")
        compared, gaps = 0, []
        for prompt, said, usual in zip(
            prompts, run.texts, (plain or run).texts, strict=True
        ):
            same = [one == other for one, other in zip(said, usual, strict=True)]
            at = same.index(False) if False in same else len(same)
            compared += min(at + 1, len(same))
            if at < len(same):
                token_ids = torch.tensor([[*prompt, *usual[:at]]])
                logits = exact(token_ids, logits_to_keep=1).logits[0, -1]
                gaps.append(float((logits[usual[at]] - logits[said[at]]).abs()))
        rate = 1e3 * len(gaps) / compared
        rows.append(Difference(name, compared, len(gaps), rate, max(gaps, default=0.0)))
    return rows


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


NOTES = """\
SmolLM2-135M-Instruct in {dtype} on Spec-Bench: {num_prompts} questions, {per_category} of each category without
those of more than {longest} tokens; answers of {num_tokens} tokens. One thread. A number
behind a method's name is its drafts per step at most; vLLM's chains, and "none, V1", run in vLLM's Model Runner V1,
its default on a CPU, trees and "none, V2" in V2. All run eagerly. Trees of different sizes
share an engine, and requests ask for their size. All forget what they have read before
each batch of questions, which a server would not: recycle and suffix start from nothing. layer_skip takes its default layers.

Times are of decoding, without reading the prompts. over_plain and over_chains compare
tokens per CPU second with the faster of the two runs without speculation and with vLLM's
best chain in the same setting; over_plain_wall compares tokens per second of the clock,
on a machine that did other work at the same time. peak_gb: resident memory of the engine's
process, Python and vLLM included.

differences: answers that leave that of no speculation in the same model runner, per 1,000
tokens compared; worst_gap: the two tokens' logits apart at the worst of them, in float32.

"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--per-category", type=int, default=1, help="questions")
    parser.add_argument("--longest", type=int, default=1500, help="question, in tokens")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--dtype", choices=TIES, default="float32")
    parser.add_argument("--methods", nargs="*", help="beginnings of engines' names")
    parser.add_argument("--settings", nargs="*", default=["0,1", "1,1", "0,4", "1,4"])
    parser.add_argument("--small", action="store_true", help="the least there is")
    parser.add_argument("--out", type=Path, default=RESULTS / "real.md")
    options = parser.parse_args()
    if options.small:
        options.per_category, options.tokens, options.longest = 1, 6, 60
        options.settings = ["0,4"]
        options.methods = [PLAIN, f"{CHAIN} ngram, 4", f"{OURS} suffix+recycle"]
    names = [
        name
        for name in engines()
        if name.startswith(tuple(options.methods or [""]))
        and (not name.startswith(f"{CHAIN} suffix") or has_arctic_inference())
    ]
    model = str(fetch())
    prompts = [
        prompt
        for prompt in chats(model, options.per_category)
        if len(prompt) <= options.longest
    ]
    bench = Bench(model, options.dtype, names)
    bench.measure(prompts, 4, 0.0, 4)  # reads prompts, compiles
    rows, found = [], []
    for setting in options.settings:
        temperature, batch = float(setting.split(",")[0]), int(setting.split(",")[1])
        runs = bench.measure(prompts, batch, temperature, options.tokens)
        rows += rows_of(temperature, batch, runs)
        if not temperature:
            found += differences(model, prompts, runs)
        tables = tables_of(rows, found)
        notes = NOTES.format(
            dtype=options.dtype,
            num_prompts=len(prompts),
            per_category=options.per_category,
            longest=options.longest,
            num_tokens=options.tokens,
        )
        options.out.write_text(head() + notes + tables)  # whoever is stopped has tables
        progress(f"T={temperature}, batch {batch}: done")
    print(tables)
    if any(row.worst_gap > TIES[options.dtype] for row in found):
        raise SystemExit("not what the target says: a greedy token that is no near tie")


def has_arctic_inference() -> bool:
    from vllm.utils.import_utils import has_arctic_inference as found

    return bool(found())


def chats(model: str, per_category: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for question in sample(per_category)
    ]


def head() -> str:
    import subprocess

    import vllm

    commit = subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS, text=True
    ).strip()
    command = " ".join(["python benchmarks/bench_real.py", *sys.argv[1:]])
    cpu = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    return (
        f"# A real model, real prompts\n\n```\n{command}\n```\n\n"
        f"Commit {commit}. {machine()}, vLLM {vllm.__version__}; {cpu}.\n\n"
    )


def tables_of(rows: list[Row], found: list[Difference]) -> str:
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        print_table("Speed", rows)
        if found:
            print_table("Greedy differences from no speculation", found)
    return written.getvalue()


if __name__ == "__main__":
    main()
