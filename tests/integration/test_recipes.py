"""Every command of docs/recipes.md is one that the engine would take."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_treespec.integration.engine_args import from_vllm_config, has_trees

PAGE = Path(__file__).parents[2] / "docs/recipes.md"


def _shape(
    kind: type, layers: int, hidden: int, heads: int, kv: int, **more: Any
) -> Any:
    return kind(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        **{"head_dim": 128, "max_position_embeddings": 8192, **more},
    )


LLAMA = {"vocab_size": 128256}
QWEN = {"vocab_size": 151936}
# As published with the checkpoints.
MODELS: dict[str, Callable[[], Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": lambda: _shape(
        transformers.LlamaConfig, 32, 4096, 32, 8, **LLAMA
    ),
    "meta-llama/Llama-3.3-70B-Instruct": lambda: _shape(
        transformers.LlamaConfig, 80, 8192, 64, 8, **LLAMA
    ),
    "meta-llama/Llama-3.2-1B-Instruct": lambda: _shape(
        transformers.LlamaConfig, 16, 2048, 32, 8, head_dim=64, **LLAMA
    ),
    "Qwen/Qwen2.5-32B-Instruct": lambda: _shape(
        transformers.Qwen2Config, 64, 5120, 40, 8, vocab_size=152064
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": lambda: _shape(
        transformers.Qwen2Config, 24, 896, 14, 2, head_dim=64, **QWEN
    ),
    "Qwen/Qwen3-32B": lambda: _shape(transformers.Qwen3Config, 64, 5120, 64, 8, **QWEN),
    "Qwen/Qwen3-0.6B": lambda: _shape(
        transformers.Qwen3Config, 28, 1024, 16, 8, **QWEN
    ),
    "google/gemma-3-1b-it": lambda: _shape(
        transformers.Gemma3TextConfig, 26, 1152, 4, 1, head_dim=256, vocab_size=262144
    ),
    "openai/gpt-oss-120b": lambda: _shape(
        transformers.GptOssConfig, 36, 2880, 64, 8, head_dim=64, vocab_size=201088
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": lambda: _shape(
        transformers.MistralConfig, 32, 4096, 32, 8, vocab_size=32768
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": lambda: _shape(
        transformers.MixtralConfig, 32, 4096, 32, 8, vocab_size=32000
    ),
    "Qwen/Qwen3-30B-A3B": lambda: _shape(
        transformers.Qwen3MoeConfig, 48, 2048, 32, 4, **QWEN
    ),
    "Qwen/Qwen3-235B-A22B": lambda: _shape(
        transformers.Qwen3MoeConfig, 94, 4096, 64, 4, **QWEN
    ),
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(vllm serve .*?)```", PAGE.read_text(), re.S)
    assert len(blocks) >= 10
    return blocks


@pytest.fixture(autouse=True)
def _inspect_models_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # A process of its own for each architecture takes ten seconds to import vLLM.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A folder with that model's configuration, a few tokens and no weights to speak of."""
    root = tmp_path_factory.mktemp("recipes")

    def path(name: str) -> str:
        where = root / name.replace("/", "--")
        if not where.exists():
            config = MODELS[name]()
            model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
            config.architectures = [model_class.__name__]
            config.save_pretrained(where)
            words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizers.Tokenizer(words), unk_token="a"
            ).save_pretrained(where)
            save_file({"nothing": torch.zeros(1)}, str(where / "model.safetensors"))
        return str(where)

    return path


def engine_config(command: str, folder: Callable[[str], str]) -> Any:
    """What `vllm serve` would run, with folders in place of names and one rank."""
    for name in MODELS:
        command = command.replace(name, folder(name)) if name in command else command
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    words = shlex.split(command)
    assert words[:2] == ["vllm", "serve"]
    parsed = parser.parse_args(["--model", *words[2:]])
    parsed.tensor_parallel_size = 1  # ranks are asked for devices, sizes do not change
    return EngineArgs.from_cli_args(parsed).create_engine_config()


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.split()[2])
def test_a_recipe_is_accepted(command: str, folder: Callable[[str], str]) -> None:
    vllm_config = engine_config(command, folder)
    assert has_trees(vllm_config)
    assert from_vllm_config(vllm_config).proposers
