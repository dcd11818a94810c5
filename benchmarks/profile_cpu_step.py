"""What the parts of a decode step cost on a CPU, without speculation and with trees.

    profile_cpu_step.py MODEL [--nodes 7 15 31] [--kernels auto] [--prompt-tokens 256]

Prints Markdown: milliseconds of each part, its own parts excluded, the median over the
steps that verified a whole tree. Engines start one after the other. ``--cpu-time`` counts
this process's processor time, for machines that are busy with something else.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import vllm.envs as envs
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from vllm_treespec.testing.bench import machine

NUM_TOKENS = 64


class Parts:
    """Time of wrapped functions, without that of wrapped functions they call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.milliseconds: dict[str, float] = defaultdict(float)
        self.clock = clock
        self._inner: list[float] = []

    def wrap(self, part: str, owner: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = self.clock()
            try:
                return call(*args, **kwargs)
            finally:
                seconds = self.clock() - begin
                self.milliseconds[part] += 1e3 * (seconds - self._inner.pop())
                if self._inner:
                    self._inner[-1] += seconds

        setattr(owner, name, timed)


def engine(model: str, dtype: str, runner: str, nodes: int, kernels: str) -> LLM:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if runner == "V2" else "0"
    envs.disable_envs_cache()
    proposers = [{"type": "suffix"}, {"type": "recycle"}]
    speculative = {
        "method": "treespec",
        "num_speculative_tokens": nodes,
        "tree": {"proposers": proposers, "adaptive": False, "kernels": kernels},
    }
    return LLM(
        model=model,
        dtype=dtype,
        speculative_config=speculative if nodes else None,
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**28,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
    )


def watch(llm: LLM, parts: Parts) -> None:
    """Wrap what a step consists of."""
    core: Any = llm.llm_engine.engine_core
    core = core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    scheduler, model = core.scheduler, runner.model
    parts.wrap("vLLM: scheduler", scheduler, "schedule")
    parts.wrap("vLLM: scheduler", scheduler, "update_from_output")
    parts.wrap("vLLM: model runner", runner, "execute_model")
    parts.wrap("vLLM: model runner", runner, "sample_tokens")
    parts.wrap("model: norms, rotary, activations", model, "forward")
    parts.wrap("model: logits", model, "compute_logits")
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if "Linear" in type(method).__name__ and not hasattr(method, "watched"):
            method.watched = True
            parts.wrap("model: linear layers", method, "apply")
        if (impl := getattr(module, "impl", None)) is not None:
            parts.wrap("attention", impl, "forward")
            parts.wrap("attention: writing keys", impl, "do_kv_cache_update")
    if (state := getattr(runner, "model_state", None)) is not None:
        parts.wrap("attention: metadata", state, "prepare_attn")
        parts.wrap("commit", state, "postprocess_state")
    parts.wrap("sampler", runner.sampler, "sample")
    if (speculator := getattr(runner, "speculator", None)) is not None:
        parts.wrap("verify", runner.rejection_sampler, "_verify")
        parts.wrap("propose", speculator, "propose")
        parts.wrap("propose: on the host", speculator.hosted, "draft")
        parts.wrap("propose: on the device", speculator.drafts, "draft")
        parts.wrap("propose: learning", speculator.drafts, "learn_logits")
        parts.wrap("propose: learning", speculator, "_learn")
        parts.wrap("propose: build", speculator, "_build")


def profile(
    llm: LLM, nodes: int, prompt: list[int], clock: Callable[[], float]
) -> dict[str, float]:
    """Median milliseconds of each part."""
    parts = Parts(clock)
    watch(llm, parts)
    scheduled: list[int] = []
    core: Any = llm.llm_engine.engine_core
    schedule = core.engine_core.scheduler.schedule

    def count(*args: Any) -> Any:
        result = schedule(*args)
        scheduled.append(result.total_num_scheduled_tokens)
        return result

    core.engine_core.scheduler.schedule = count
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False
    )
    steps: list[dict[str, float]] = []
    for round_ in range(2):  # the first compiles, and fills what proposers remember
        llm.llm_engine.add_request(str(round_), {"prompt_token_ids": prompt}, params)
        while llm.llm_engine.has_unfinished_requests():
            parts.milliseconds.clear()
            begin = clock()
            llm.llm_engine.step()
            whole = 1e3 * (clock() - begin)
            step = dict(parts.milliseconds)
            step["vLLM: engine"] = whole - sum(step.values())
            step["**whole step**"] = whole
            if round_ and scheduled[-1] == nodes + 1:
                steps.append(step)
    assert steps, "no step had a whole tree"
    return {
        part: statistics.median(step.get(part, 0.0) for step in steps)
        for part in steps[-1]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--nodes", type=int, nargs="*", default=[7, 15, 31])
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, 4000, (args.prompt_tokens,), generator=generator)
    columns: dict[str, dict[str, float]] = {}
    for runner, nodes in [("V1", 0), ("V2", 0), *(("V2", each) for each in args.nodes)]:
        llm = engine(args.model, args.dtype, runner, nodes, args.kernels)
        name = f"{nodes} nodes" if nodes else f"plain, {runner}"
        columns[name] = profile(llm, nodes, prompt.tolist(), clock)
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
    times = "processor time" if args.cpu_time else "wall clock"
    print(f"{machine()}, {args.dtype}, {torch.get_num_threads()} threads, {times}\n")
    print("| ms of a step |", " | ".join(columns), "|")
    print("| --- |" + " ---: |" * len(columns))
    names = {part for column in columns.values() for part in column}
    for part in sorted(names, key=lambda name: (name.startswith("*"), name)):
        cells = (f"{column.get(part, 0.0):.2f}" for column in columns.values())
        print(f"| {part} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
