"""What the tuning commands run models on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_treespec.config import ConfigError

if TYPE_CHECKING:  # the command line reads our defaults and may not find vLLM
    from vllm.config import ModelConfig

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Prompts, and how the models are run on them."""

    data: str
    """Text, cut into prompts, or JSON Lines with one ``prompt`` each (``.jsonl``)."""

    num_prompts: int = 64
    """Prompts drawn from the data; all of them if it has fewer."""

    max_tokens: int = 128
    """Longest continuation of a prompt."""

    prompt_tokens: int = 64
    """Tokens of a prompt cut from text; JSON Lines keep theirs."""

    seed: int = 0
    """Decides which prompts are drawn and what is sampled."""

    dtype: str = "auto"
    """As vLLM's ``--dtype``, for every model."""

    max_model_len: int | None = None
    """As vLLM's ``--max-model-len``, for every model; None: as long as needed."""

    gpu_memory_utilization: float | None = None
    """As vLLM's option."""

    engine: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of ``vllm.LLM``."""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError("invalid measurement:\n  " + "\n  ".join(problems))

    def _problems(self) -> Iterator[str]:
        for name in ("num_prompts", "max_tokens", "prompt_tokens"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)}: must be >= 1"

    @property
    def engine_options(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that every model gets."""
        chosen = {
            "dtype": self.dtype,
            "seed": self.seed,
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            # A few hundred steps do not repay compilation.
            "enforce_eager": True,
            **self.engine,
        }
        return {name: value for name, value in chosen.items() if value is not None}


def read_texts(options: RunOptions) -> list[str]:
    """The prompts of JSON Lines, or the one text that is yet to be cut.

    Raises:
        ConfigError: if the data cannot be read as either.
    """
    path = Path(options.data)
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data={str(path)!r}: cannot be read ({error}); name a text file or JSON "
            "Lines with a 'prompt' each"
        ) from error
    if not content.strip():
        raise ConfigError(f"data={str(path)!r}: is empty; it needs text or prompts")
    if path.suffix != ".jsonl":
        return [content]
    # Not splitlines, which also cuts at separators that JSON allows within a string.
    lines = enumerate(content.split("\n"), start=1)
    return [_prompt_of(f"{path}:{n}", line) for n, line in lines if line.strip()]


def _prompt_of(where: str, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"{where}: must be an object with a text 'prompt'")
    return prompt


def make_prompts(
    options: RunOptions, texts: Sequence[str], target: ModelConfig
) -> list[list[int]]:
    """Token ids of the prompts drawn, in the data's order.

    Raises:
        ConfigError: if a text is shorter than a prompt.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(target)
    if Path(options.data).suffix == ".jsonl":
        drawn = _draw(options, texts)
        return [list(tokenizer.encode(text)) for text in drawn]
    token_ids = list(tokenizer.encode(texts[0], add_special_tokens=False))
    # Every prompt begins like a text of its own, with a <bos> if the model has one.
    begin, size = list(tokenizer.encode("")), options.prompt_tokens
    starts = range(0, len(token_ids) - size + 1, size)
    if not starts:
        raise ConfigError(
            f"data={options.data!r}: has {len(token_ids)} tokens, a prompt has "
            f"prompt_tokens={size}; give more text or shorter prompts"
        )
    return [begin + token_ids[start : start + size] for start in _draw(options, starts)]


def _draw(options: RunOptions, choices: Sequence[_T]) -> list[_T]:
    """``num_prompts`` of them, in order; all if there are fewer."""
    count = min(options.num_prompts, len(choices))
    drawn = random.Random(options.seed).sample(range(len(choices)), count)
    return [choices[place] for place in sorted(drawn)]
