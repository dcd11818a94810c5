"""python benchmarks/bench_recycle.py

Replays texts through every proposer that needs no model, alone and merged. The target
of a replay says what the text says; its logits, which ``recycle`` reads, are those of
the bundled target on the same text. Eight requests are decoded at a time, and what they
taught is kept for the next eight.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from vllm_treespec.config import TreeSpecConfig, max_candidates
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.propose.ngram import NgramProposer
from vllm_treespec.core.propose.recycle import Recycler
from vllm_treespec.core.propose.suffix import SuffixProposer
from vllm_treespec.testing.bench import print_table
from vllm_treespec.testing.replay import (
    CPU,
    Alone,
    Drafter,
    DraftModel,
    HostSource,
    Merged,
    RecycleSource,
    Source,
    Texts,
    replay,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "models"))
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_model_free  # noqa: E402 (found through the line above)
import train  # noqa: E402

MODEL = ROOT / "models/python-stdlib/target"
NODE_COUNTS = (8, 16, 32, 64)
BATCH = 8
MAX_DEPTH = 64
KERNELS = choose_kernels(TreeSpecConfig(), CPU)
Workload = list[Texts]  # a batch each


# ------------------------------------------------------------------------ workloads
def batches(
    token_ids: Sequence[torch.Tensor], prompt_len: int, num_tokens: int
) -> Workload:
    length = prompt_len + num_tokens + MAX_DEPTH
    whole = [each[:length] for each in token_ids if len(each) >= length]
    return [
        Texts(torch.stack(whole[first : first + BATCH]), prompt_len, num_tokens, 0.0)
        for first in range(0, len(whole), BATCH)
    ]


def encode(text: str) -> torch.Tensor:
    return torch.from_numpy(bench_model_free.encode(text)).long()


def cold_sources(prompt_len: int = 256, num_tokens: int = 1500) -> Workload:
    """Files that the target was not trained on, none of them seen before."""
    _, held_out = train.read_corpus()
    return batches([encode(text) for text in held_out], prompt_len, num_tokens)


def edited_sources(prompt_len: int = 900, num_tokens: int = 700) -> Workload:
    """The prompt is a file, the text goes on with the file, one line in 30 edited."""
    rng = random.Random(0)
    token_ids = []
    for text in bench_model_free.stdlib_files(4000, 12000, seed=0)[: 2 * BATCH]:
        prompt, edited = encode(text), encode(bench_model_free.edit(text, rng))
        token_ids.append(torch.cat([prompt[:prompt_len], edited]))
    return batches(token_ids, prompt_len, num_tokens)


def agent_logs(num_requests: int = 16, num_tokens: int = 500) -> Workload:
    """JSON lines of tools called one after the other, over the same few files."""
    rng = random.Random(1)
    token_ids = [encode(agent_log(rng)) for _ in range(num_requests)]
    return batches(token_ids, 64, num_tokens)


def agent_log(rng: random.Random, num_calls: int = 24) -> str:
    tools = ("read_file", "write_file", "list_files", "run_tests", "search")
    words = ("parser", "server", "client", "cache", "config", "errors", "utils")
    lines = []
    for step in range(num_calls):
        call = {
            "step": step,
            "tool": rng.choice(tools),
            "arguments": {
                "path": f"src/{rng.choice(words)}/{rng.choice(words)}.py",
                "line": rng.randrange(400),
            },
            "status": rng.choice(("ok", "ok", "ok", "error")),
            "seconds": round(rng.random(), 3),
        }
        lines.append(json.dumps(call))
    return "\n".join(lines)


# ---------------------------------------------------------------------- contestants
@cache
def target() -> DraftModel:
    from transformers import AutoModelForCausalLM

    return DraftModel(AutoModelForCausalLM.from_pretrained(MODEL).float().eval())


class Timed:
    """A source whose time is measured."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.seconds = {"propose": 0.0, "learn": 0.0}
        self.start = source.start

    def propose(
        self, rows: torch.Tensor, roots: torch.Tensor, out: DeviceCandidates
    ) -> None:
        begin = time.thread_time()
        self.source.propose(rows, roots, out)
        self.seconds["propose"] += time.thread_time() - begin

    def learn(self, *arguments: torch.Tensor) -> None:
        begin = time.thread_time()
        self.source.learn(*arguments)
        self.seconds["learn"] += time.thread_time() - begin


def suffix(num_nodes: int) -> Source:
    return HostSource(
        SuffixProposer(
            max_num_reqs=BATCH,
            max_nodes=num_nodes,
            max_depth=MAX_DEPTH,
            max_learned_tokens=1 << 20,
        )
    )


def ngram(num_nodes: int) -> Source:
    return HostSource(NgramProposer(max_nodes=num_nodes, max_depth=MAX_DEPTH))


def recycle(num_nodes: int, k: int = 16, depth: int = 8) -> Source:
    vocab_size = bench_model_free.tokenizer().get_vocab_size()
    recycler = Recycler(
        KERNELS,
        vocab_size=vocab_size,
        k=k,
        depth=depth,
        max_nodes=num_nodes,
        max_num_reqs=BATCH,
        device=CPU,
    )
    return RecycleSource(target(), recycler)


CONTESTANTS: dict[str, tuple[Callable[[int], Source], ...]] = {
    "suffix": (suffix,),
    "ngram": (ngram,),
    "recycle": (recycle,),
    "recycle+suffix": (recycle, suffix),
}


class Result(NamedTuple):
    accepted: float  # draft tokens per step and request
    propose_us: list[float]  # per source, of a step of the batch
    learn_us: list[float]  # what the target said, nothing for those on the host


def run(
    makers: Iterable[Callable[[int], Source]], workload: Workload, num_nodes: int
) -> Result:
    makers = tuple(makers)
    room = max_candidates(len(makers), num_nodes)
    sources = [Timed(make(room)) for make in makers]
    drafter: Drafter = (
        Alone(sources[0], num_nodes, BATCH)
        if len(sources) == 1
        else Merged(KERNELS, sources, num_nodes, BATCH)
    )
    num_tokens = num_steps = max_steps = 0.0
    for texts in workload:
        outcome = replay(texts, drafter)
        num_tokens += outcome.num_tokens.sum()
        num_steps += outcome.num_steps.sum()
        max_steps += outcome.num_steps.max()
    times = (
        [1e6 * each.seconds[part] / max_steps for each in sources]
        for part in ("propose", "learn")
    )
    return Result(float(num_tokens / num_steps) - 1, *times)


class AcceptedRow(NamedTuple):
    text: str
    nodes: int
    suffix: float
    ngram: float
    recycle: float
    recycle_suffix: float
    merged_vs_best: float  # recycle+suffix over the better of the two


class TimeRow(NamedTuple):
    text: str
    nodes: int
    suffix_us: float
    ngram_us: float
    recycle_us: float
    recycle_learn_us: float


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, nargs="*", default=NODE_COUNTS)
    parser.add_argument("--only", nargs="*", help="texts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    workloads = {
        "cold": cold_sources,
        "edited": edited_sources,
        "agent logs": agent_logs,
    }
    accepted, times = [], []
    for name in options.only or workloads:
        workload = workloads[name]()
        for num_nodes in options.nodes:
            results = {
                each: run(makers, workload, num_nodes)
                for each, makers in CONTESTANTS.items()
            }
            means = [each.accepted for each in results.values()]
            best = max(results["suffix"].accepted, results["recycle"].accepted)
            ratio = results["recycle+suffix"].accepted / best
            accepted.append(AcceptedRow._make((name, num_nodes, *means, ratio)))
            times.append(
                TimeRow(
                    name,
                    num_nodes,
                    *(results[each].propose_us[0] for each in list(results)[:3]),
                    results["recycle"].learn_us[0],
                )
            )
            print(accepted[-1], file=sys.stderr, flush=True)
    print_table("Accepted draft tokens per step", accepted)
    print_table(f"CPU us per step of {BATCH} requests", times)


if __name__ == "__main__":
    main()
