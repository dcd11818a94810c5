"""``vllm-treespec check``: would the engine start, and as what?

The configuration comes first, before vLLM is imported; then the places where we meet
vLLM, and last vLLM's own construction of its configuration, which is all that happens
before weights are loaded: device, model runner, the models' ``config.json`` and tokens.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_treespec.config import (
    METHOD,
    ConfigError,
    DraftModelConfig,
    LayerSkipConfig,
    ProposerConfig,
    RequestOptions,
    TreeSpecConfig,
)
from vllm_treespec.strict_json import read_object

# Stands in for a target that was not named: whatever decodes will do.
STAND_IN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2**17,
}


def check(speculative_config: str, engine: Sequence[str] = ()) -> None:
    """Print what was found.

    Args:
        engine: the target and more words of vLLM's command line.

    Raises:
        ConfigError: saying why the engine would not start.
    """
    raw = read_object(speculative_config)
    if "method" not in raw:
        raise ConfigError(f'method is missing: write "method": "{METHOD}"')
    config = TreeSpecConfig.parse(raw)
    print(f"vllm-treespec {version('vllm-treespec')}")
    print("config:", json.dumps(config.to_dict(), indent=2))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    _in_one_line("vLLM cannot be imported", _check_seams)
    _in_one_line("the engine would not start", lambda: _check_start(config, engine))


def _in_one_line(what: str, step: Callable[[], None]) -> None:
    try:
        step()
    except ConfigError:
        raise
    except (ImportError, AttributeError, OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{what}: {type(error).__name__}: {text}") from error


def _check_seams() -> None:
    import vllm

    from vllm_treespec.integration.plugin import refusal
    from vllm_treespec.integration.seams import HOOKS, PATCHES, moved

    if found := moved([*PATCHES, *HOOKS]):
        raise ConfigError(refusal(RuntimeError("; ".join(found))))
    print(f"vllm {vllm.__version__}: all {len(PATCHES) + len(HOOKS)} seams fit")


def _check_start(config: TreeSpecConfig, engine: Sequence[str]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    with tempfile.TemporaryDirectory() as folder:
        if not engine:
            config, engine = _without_target(config, Path(folder))
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        parsed = parser.parse_args(["--model", *engine])
        args: Any = EngineArgs.from_cli_args(parsed)
        args.speculative_config = config.to_dict()
        found = args.create_engine_config()
    print(f"device {found.device_config.device_type}, Model Runner V2: would start")


def _without_target(
    config: TreeSpecConfig, folder: Path
) -> tuple[TreeSpecConfig, list[str]]:
    """What can be checked nevertheless: a draft fits itself, anything fits a tiny model
    but layers that are skipped."""
    print(
        "no target was named: what depends on it is not checked (check JSON MODEL ...)"
    )
    proposers: tuple[ProposerConfig, ...] = tuple(
        each for each in config.proposers if not isinstance(each, LayerSkipConfig)
    )
    if len(proposers) < len(config.proposers):
        free = {"verify": "auto", "request_defaults": RequestOptions()}
        proposers = proposers or TreeSpecConfig().proposers
        config = config.model_copy(update={"proposers": proposers, **free})
    for each in proposers:
        if isinstance(each, DraftModelConfig):
            revision = ["--revision", each.revision] if each.revision else []
            return config, [each.model, *revision]
    (folder / "config.json").write_text(json.dumps(STAND_IN))
    return config, [str(folder), "--skip-tokenizer-init", "--dtype", "float32"]
