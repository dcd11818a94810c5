"""LoRA adapters of each request beside trees: a tree's nodes have their request's.

Every request has an adapter: vLLM's CPU kernels give the last one to those without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.engine.conftest import SHAPE, VOCAB_SIZE

HIDDEN, RANK = SHAPE["hidden_size"], 4
HEAD = {"lm_head": (HIDDEN, VOCAB_SIZE)}
LAYERS = {
    f"model.layers.{layer}.{part}": sizes
    for layer in range(SHAPE["num_hidden_layers"])
    for part, sizes in {
        "self_attn.q_proj": (HIDDEN, 128),
        "self_attn.v_proj": (HIDDEN, 64),
        "mlp.down_proj": (SHAPE["intermediate_size"], HIDDEN),
    }.items()
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Callable[..., LoRARequest]:
    def make(number: int, parts: dict[str, tuple[int, int]]) -> LoRARequest:
        directory: Path = tmp_path_factory.mktemp(f"adapter{number}-")
        random = torch.Generator().manual_seed(number)
        weights = {}
        for name, (n_in, n_out) in parts.items():
            prefix = f"base_model.model.{name}"
            lora_a = torch.randn(RANK, n_in, generator=random)
            lora_b = torch.randn(n_out, RANK, generator=random)
            weights[f"{prefix}.lora_A.weight"] = 0.2 * lora_a
            weights[f"{prefix}.lora_B.weight"] = 0.2 * lora_b
        save_file(weights, directory / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": sorted({name.split(".")[-1] for name in parts}),
            "bias": "none",
            "task_type": "CAUSAL_LM",
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        return LoRARequest(f"adapter{number}", number, str(directory))

    return make


def ask(
    engine: Any, batch: Sequence[Sequence[int]], adapters: Sequence[LoRARequest]
) -> list[list[int]]:
    outputs = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in batch],
        SamplingParams(max_tokens=24, temperature=0.0, detokenize=False),
        lora_request=list(adapters),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("parts", [LAYERS, HEAD], ids=["layers", "head"])
def test_adapters_that_change_from_request_to_request_change_no_token(
    parts, async_scheduling, adapter, model_path, draft_path, prompts, start, acceptance
):
    one, two = adapter(1, parts), adapter(2, parts)
    # What is learned under one adapter is drafted under the next.
    batch, orders = prompts(4, seed=3), [[one, two, two, one], [two, two, one, one]]
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    plain_engine = start(model_path("llama"), **options)
    plain = [ask(plain_engine, batch, order) for order in orders]
    assert plain[0][0] != plain[1][0], "adapters change what is said"
    model = {"type": "draft_model", "model": draft_path("llama"), "depth": 3}
    engine = start(
        model_path("llama"),
        tree={"proposers": [model, {"type": "suffix"}, {"type": "recycle"}]},
        async_scheduling=async_scheduling,
        **options,
    )
    assert [ask(engine, batch, order) for order in orders] == plain
    assert sum(acceptance.lengths) > 10
    assert engine.metric("vllm:treespec_proposer_faults") == 0
