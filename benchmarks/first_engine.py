"""python benchmarks/first_engine.py PROPOSER [--eager]

The smallest engine that drafts in one way, against none: do the tokens agree? On a new
machine this comes before every timing.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from vllm import LLM, SamplingParams

from vllm_treespec.testing.bench import print_table

MODELS = Path(__file__).parents[1] / "models/python-stdlib"
PROPOSERS: dict[str, dict[str, Any]] = {
    "suffix": {"type": "suffix"},
    "recycle": {"type": "recycle"},
    "draft_model": {"type": "draft_model", "model": str(MODELS / "draft"), "depth": 3},
    "layer_skip": {"type": "layer_skip", "depth": 2, "width": 2},
}
PROMPTS = ["class Stack:\n    def __init__(self):\n", "for i in range(10):\n"]


class Row(NamedTuple):
    proposer: str
    mode: str
    identical: bool
    seconds: float


def decode(proposer: str | None, *, eager: bool) -> list[list[int]]:
    speculative = proposer and {
        "method": "treespec",
        "num_speculative_tokens": 31,
        "tree": {"proposers": [PROPOSERS[proposer]], "adaptive": False},
    }
    llm = LLM(
        str(MODELS / "target"),
        speculative_config=speculative or None,
        # In half precision near ties fall either way.
        dtype="float32",
        enforce_eager=eager,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**26,
    )
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("proposer", choices=PROPOSERS)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    eager = options.eager or not torch.cuda.is_available()
    plain = decode(None, eager=eager)
    begin = time.monotonic()
    tokens = decode(options.proposer, eager=eager)
    seconds = time.monotonic() - begin  # with the start
    mode = "eager" if eager else "graphs"
    print_table(
        "The first engine", [Row(options.proposer, mode, tokens == plain, seconds)]
    )
    raise SystemExit(tokens != plain)


if __name__ == "__main__":
    main()
