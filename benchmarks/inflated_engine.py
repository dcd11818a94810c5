"""Engines whose models are small ones in a large shape, and what benchmarks do with them.

The bundled pair is inflated (see ``vllm_treespec/testing/inflate.py``), so text and
acceptance are real and the cost is that of the large shapes. Weights are made where they
are needed, on the device; nothing is written but a ``config.json``. All engines live in
this process and share one copy of them, so that rounds of several can take turns.
"""

from __future__ import annotations

import os

if ON_CPU := not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no warm-up
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import vllm
import vllm.envs as envs
from transformers import LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.sampling_params import RequestOutputKind

from vllm_treespec.integration.engine_args import has_trees
from vllm_treespec.testing.bench import machine
from vllm_treespec.testing.continuations import spread_prompts
from vllm_treespec.testing.inflate import (
    LLAMA_1B,
    LLAMA_8B,
    LLAMA_70B_QUARTER,
    Inflated,
    Shape,
)

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models/python-stdlib"
RESULTS = ROOT / "benchmarks/results"
sys.path.insert(0, str(ROOT / "models"))

import train  # noqa: E402 (found through the line above)

DTYPE = "float32" if ON_CPU else "bfloat16"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
PROMPT_LEN = 64
# Logits that rounding may reorder; bfloat16 moves those of the bundled target by 0.15.
TIE = 1e-3 if ON_CPU else 0.5
# A little of every dimension, so that the miniature takes the same way.
MINIATURE = {
    "target": Shape(
        hidden_size=320,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=672,
        vocab_size=2176,
        tie_word_embeddings=False,
    ),
    "draft": Shape(
        hidden_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=352,
        vocab_size=2176,
        tie_word_embeddings=True,
    ),
}
SIZES: dict[str, dict[str, Shape]] = {
    "miniature": MINIATURE,
    "8B": {"target": LLAMA_8B, "draft": LLAMA_1B},
    "70B-quarter": {"target": LLAMA_70B_QUARTER, "draft": LLAMA_1B},
}


@register_model_loader("inflated")
class InflatedLoader(BaseModelLoader):
    """Makes weights instead of reading them, and the same ones only once."""

    _made: ClassVar[dict[str, dict[str, torch.Tensor]]] = {}

    def download_model(self, model_config: Any) -> None:
        """There is nothing to download."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        folder = model_config.model
        if folder in self._made:
            for name, weight in model.named_parameters():
                weight.data = self._made[folder][name]
            return
        config = json.loads((Path(folder) / "config.json").read_text())
        inflated = Inflated(Path(config["inflated_from"]), Shape.of(config))
        model.load_weights(inflated.weights(model_config.dtype, DEVICE))
        self._made[folder] = {
            name: weight.data for name, weight in model.named_parameters()
        }


class Models:
    """Folders of an inflated target and draft, for as long as this lives."""

    def __init__(self, size: str) -> None:
        self.size = size
        self._scratch = tempfile.TemporaryDirectory()
        for role, shape in SIZES[size].items():
            inflated = Inflated(MODELS / role, shape)
            own = {"inflated_from": str(MODELS / role), "dtype": DTYPE}
            config = {**inflated.config, **own}
            self.path(role).mkdir()
            (self.path(role) / "config.json").write_text(json.dumps(config, indent=2))

    def path(self, role: str) -> Path:
        return Path(self._scratch.name) / role


def start(
    models: Models,
    speculative: dict[str, Any] | None,
    *,
    max_num_seqs: int,
    max_model_len: int,
    kv_cache_bytes: int,
) -> LLM:
    """An engine beside any others; ``speculative`` is vLLM's speculative_config."""
    choose_model_runner(speculative)
    options: dict[str, Any] = {"enforce_eager": True}
    if not ON_CPU:
        # Whole steps in CUDA graphs without torch.compile, which takes minutes for each.
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        options = {"compilation_config": graphs}
        # The share that must be free at start; the others' memory is not.
        options["gpu_memory_utilization"] = 0.05
    return LLM(
        model=str(models.path("target")),
        load_format="inflated",
        dtype=DTYPE,  # vLLM's own choice for float32 is half precision
        speculative_config=speculative,
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=kv_cache_bytes,
        max_num_batched_tokens=max(8192, max_model_len),
        enable_prefix_caching=False,
        disable_log_stats=False,
        distributed_executor_backend="uni",
        use_tqdm_on_load=False,
        **options,
    )


def choose_model_runner(speculative: dict[str, Any] | None) -> None:
    """V2, which does not know vLLM's suffix decoding."""
    is_suffix = speculative is not None and speculative["method"] == "suffix"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0" if is_suffix else "1"
    envs.disable_envs_cache()  # the last engine's choice


def model_runner(llm: LLM) -> Any:
    """vLLM's, which lives in this process."""
    core: Any = llm.llm_engine.engine_core
    return core.engine_core.model_executor.driver_worker.worker.model_runner


@dataclass
class Run:
    """What an engine said to prompts that it got at once, and when."""

    texts: list[list[int]]
    seconds: float  # of everything, the prompts' prefill too
    num_decoded: int  # tokens behind the first of each request
    num_steps: int  # that a request took part in for them, of all requests
    decoding: list[float] = field(default_factory=list)  # seconds a token, by request


def decode(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    num_tokens: int,
) -> Run:
    engine = llm.llm_engine
    params = SamplingParams(
        temperature=temperature,
        max_tokens=num_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    texts: dict[str, list[int]] = {str(row): [] for row in range(len(prompts))}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    num_decoded = num_steps = 0
    begin = time.perf_counter()
    for name, prompt in zip(texts, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            name, now = output.request_id, time.perf_counter()
            said = output.outputs[0].token_ids
            texts[name] += said
            if name not in first and said:
                first[name] = now
            elif said:
                num_decoded, num_steps = num_decoded + len(said), num_steps + 1
                last[name] = now
    return Run(
        list(texts.values()),
        time.perf_counter() - begin,
        num_decoded,
        num_steps,
        [(last[name] - first[name]) / (num_tokens - 1) for name in texts],
    )


def forget(llm: LLM) -> None:
    """What proposers with a memory have read: the next run is about other text."""
    config = llm.llm_engine.vllm_config
    if has_trees(config):
        llm.collective_rpc("treespec_clear")
    elif config.speculative_config and config.speculative_config.method == "suffix":
        runner = model_runner(llm)
        runner.drafter = type(runner.drafter)(config)


def held_out_prompts(count: int) -> list[list[int]]:
    """From files that neither model has seen."""
    files = [train.encode(MODELS / "target", [text]) for text in train.read_corpus()[1]]
    return spread_prompts(files, count, PROMPT_LEN)[0].tolist()


@functools.cache
def small_target() -> Any:
    folder = MODELS / "target"
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


@torch.inference_mode()
def worst_choice(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> float:
    """How far the least likely token of all texts was behind the likeliest, in logits
    of the small target in float32: 0 for greedy text without rounding."""
    small, worst = small_target(), 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        token_ids = torch.tensor([[*prompt, *text]], device=DEVICE)
        logits = small(token_ids).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, token_ids[0, len(prompt) :, None])[:, 0]
        worst = max(worst, float((logits.amax(1) - chosen).max()))
    return worst


def header(title: str, command: str) -> str:
    """The head of a results file."""
    commit = subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True
    ).strip()
    miniature = (
        "**A miniature on a CPU: kernels are interpreted and models tiny. Its times and "
        "their\nratios say nothing about a GPU; speed is unmeasured.**\n\n"
    )
    return (
        f"# {title}\n\n```\n{command}\n```\n\n{miniature if ON_CPU else ''}"
        f"Commit {commit}. {machine()}, vLLM {vllm.__version__}.\n\n"
    )
