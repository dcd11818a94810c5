"""What drafting costs beside the draft model's own forwards.

A draft of the shape of a 0.5B model grows trees of depth 6 and width 8, in CUDA graphs
where there is a GPU; weights are random, which changes no time. On a CPU the bundled
draft stands in, to keep the script alive: its ratio says nothing about a GPU.

    python benchmarks/bench_draft_phase.py
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

if ON_CPU := not torch.cuda.is_available():
    os.environ["VLLM_CPU_CI_ENV"] = "1"

from vllm import LLM

from vllm_treespec.integration.cuda_graphs import GraphedRows
from vllm_treespec.testing.bench import median_us, print_table

MODELS = Path(__file__).parents[1] / "models/python-stdlib"
HALF_B = {  # Qwen2.5-0.5B
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
DEPTH, WIDTH = 6, 8
CONTEXT = 192 if ON_CPU else 1024


class Row(NamedTuple):
    reqs: int
    catch_up_us: float
    grow_us: float
    forwards_us: float
    ratio: float


def start(directory: Path) -> LLM:
    """An engine with a target of one layer and the draft."""
    if ON_CPU:
        target, draft = str(MODELS / "target"), str(MODELS / "draft")
        options: dict[str, Any] = {"enforce_eager": True, "dtype": "float32"}
        options |= {"kv_cache_memory_bytes": 2**24, "max_model_len": 256}
    else:
        target, draft = str(directory / "target"), str(directory / "draft")
        for path, layers in ((target, 1), (draft, HALF_B["num_hidden_layers"])):
            Path(path).mkdir()
            config = {**HALF_B, "num_hidden_layers": layers}
            (Path(path) / "config.json").write_text(json.dumps(config))
        options = {"load_format": "dummy", "max_model_len": 2048}
        options |= {"gpu_memory_utilization": 0.5}
    proposer = {"type": "draft_model", "model": draft, "depth": DEPTH, "width": WIDTH}
    return LLM(
        model=target,
        skip_tokenizer_init=True,
        max_num_seqs=4 if ON_CPU else 16,
        distributed_executor_backend="uni",
        speculative_config={
            "method": "treespec",
            "num_speculative_tokens": 32,
            "tree": {
                "proposers": [proposer],
                "adaptive": False,
                "max_rows": 2**20,
            },
        },
        **options,
    )


def forwards_of(draft: Any, device: torch.device) -> Callable[[int], None]:
    """The draft's forwards of one step with their logits, and nothing else."""

    def run(num_reqs: int) -> None:
        first = 0
        widths = [draft.max_accepted + 2, *draft.grower.shape.num_rows[1:]]
        for level, width in enumerate(widths):
            first += width if level else 1
            rows = torch.arange(num_reqs, device=device)
            rows = rows.repeat_interleave(width, output_size=num_reqs * width)
            zeros = torch.zeros_like(rows)
            starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=device)
            lengths = torch.full_like(starts[1:], CONTEXT + first)
            draft.grower.batch.num_nodes[:num_reqs] = first if level else 0
            hidden = draft._forward(
                zeros.int(), zeros, zeros - 1, rows, starts * width, lengths, width
            )
            draft._logits(hidden if level else hidden[:num_reqs])

    return run


def measure(draft: Any, forwards: GraphedRows, num_reqs: int) -> Row:
    draft._slots[:num_reqs] = 0
    draft._starts[:num_reqs] = CONTEXT - 2
    draft._ends[:num_reqs] = CONTEXT
    draft._active[:num_reqs] = True
    catch_up = median_us(
        lambda: draft._feed_decodes[max(draft._feed_decodes)](num_reqs)
    )
    grow = median_us(lambda: draft._grow_all[False](num_reqs))
    assert (draft._out.num_candidates[:num_reqs] > 0).all(), "nothing was drafted"
    pure = median_us(lambda: forwards(num_reqs))
    return Row(num_reqs, catch_up, grow, pure, (catch_up + grow) / pure)


@torch.inference_mode()
def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        llm = start(Path(directory))
    core: Any = llm.llm_engine.engine_core
    runner = core.engine_core.model_executor.driver_worker.worker.model_runner
    draft, device = runner.speculator.drafts.models[0], runner.device
    forwards = GraphedRows(forwards_of(draft, device))
    if not ON_CPU:
        with torch.cuda.stream(torch.cuda.Stream()):
            forwards.capture(16)
    sizes = (1, 4) if ON_CPU else (1, 4, 16)
    rows = [measure(draft, forwards, num_reqs) for num_reqs in sizes]
    print_table(
        f"One step's drafting, depth {DEPTH}, width {WIDTH}, context {CONTEXT}", rows
    )
    if ON_CPU:
        print("\nNo GPU: the bundled draft, eagerly. The ratio is not the GPU's.")
    else:
        assert rows[0].ratio <= 1.3, (
            f"batch 1: {rows[0].ratio:.2f} of the pure forwards"
        )


if __name__ == "__main__":
    main()
