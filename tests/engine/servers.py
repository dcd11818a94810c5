"""What tests of servers ask, and of which models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import torch

from vllm_treespec.testing.servers import Server

MODELS = Path(__file__).parents[2] / "models/python-stdlib"
TARGET, DRAFT = MODELS / "target", MODELS / "draft"
TREE: dict[str, Any] = {
    "method": "treespec",
    "num_speculative_tokens": 8,
    "tree": {
        "proposers": [
            {"type": "draft_model", "model": str(DRAFT), "depth": 3, "width": 2},
            {"type": "suffix"},
            {"type": "ngram"},
        ],
        # Whole trees; only a CPU's host knows which nodes are likely.
        **({} if torch.cuda.is_available() else {"min_probability": 0.0}),
    },
}
PROMPT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
