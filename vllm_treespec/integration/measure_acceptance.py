"""How often a draft's k-th choice is the target's, measured with plain vLLM.

The target continues prompts; the draft then reads the result, and the rank it gave to
every token of the continuation is what Sequoia calls positional acceptance. No tree
is involved, so the measurement holds for every shape.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_treespec.config import ConfigError
from vllm_treespec.integration.prompts import RunOptions, make_prompts, read_texts

if TYPE_CHECKING:  # the command line reads our defaults and may not find vLLM
    from vllm.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureOptions(RunOptions):
    """What is measured, and on what."""

    target: str
    """Checkpoint directory or name of the large model."""

    draft: str
    """Checkpoint directory or name of the small model, with the target's tokens."""

    temperature: float = 0.0
    """How the target samples; 0 is greedy."""

    num_ranks: int = 32
    """Choices of the draft that are told apart."""

    def _problems(self) -> Iterator[str]:
        yield from super(MeasureOptions, self)._problems()
        if self.num_ranks < 1:
            yield f"num_ranks={self.num_ranks}: must be >= 1"
        if self.temperature < 0:
            yield f"temperature={self.temperature}: must be >= 0, 0 is greedy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What came out."""

    acceptance: tuple[float, ...]  # [num_ranks], share of the positions
    num_positions: int
    options: MeasureOptions

    def write(self, path: str | Path) -> None:
        """JSON for the ``acceptance`` option of a draft model."""
        content = {
            "acceptance": self.acceptance,
            "target": self.options.target,
            "draft": self.options.draft,
            "temperature": self.options.temperature,
            "num_positions": self.num_positions,
            "vllm_treespec": version("vllm-treespec"),
        }
        Path(path).write_text(json.dumps(content, indent=2) + "\n")


def measure_acceptance(options: MeasureOptions) -> Measured:
    """Run the target, then the draft.

    Raises:
        ConfigError: before a model is loaded, if the data or the pair will not do.
    """
    texts = read_texts(options)
    target, draft = (_model_config(options, m) for m in (options.target, options.draft))
    _check_vocabularies(options, target, draft)
    prompts = make_prompts(options, texts, target)
    length = _check_lengths(options, prompts, target, draft)
    engine_options = {"max_model_len": length, **options.engine_options}
    continuations = _continue(options, prompts, engine_options)
    histogram, num_positions = [0] * options.num_ranks, 0
    for rank in _ranks(options, prompts, continuations, engine_options):
        num_positions += 1
        if rank < options.num_ranks:
            histogram[rank] += 1
    return Measured(
        acceptance=tuple(count / num_positions for count in histogram),
        num_positions=num_positions,
        options=options,
    )


def _continue(
    options: MeasureOptions,
    prompts: Sequence[Sequence[int]],
    engine_options: Mapping[str, Any],
) -> list[list[int]]:
    """What the target makes of every prompt, in tokens."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            seed=options.seed + number,
            detokenize=False,
        )
        for number in range(len(prompts))
    ]
    outputs = _generate(options.target, engine_options, prompts, params)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _ranks(
    options: MeasureOptions,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    engine_options: Mapping[str, Any],
) -> list[int]:
    """Rank, from 0, that the draft gave to every token of every continuation.

    Within the first ``num_ranks`` it is the token's place in ``torch.topk``, which is
    what a drafter sees. The rank that vLLM counts for a token by itself is no use: of
    two equal logits, common in half precision, it calls both second.
    """
    from vllm import SamplingParams

    num_ranks = options.num_ranks
    params = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=num_ranks, detokenize=False
    )
    engine_options = {
        **engine_options,
        "max_logprobs": num_ranks,
        "skip_tokenizer_init": True,
    }
    texts = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
    outputs = _generate(options.draft, engine_options, texts, params)
    ranks: list[int] = []
    for text, prompt, output in zip(texts, prompts, outputs, strict=True):
        for position in range(len(prompt), len(text)):
            choices = output.prompt_logprobs[position]
            ranks.append(choices[text[position]].rank - 1)
    return ranks


def _generate(
    model: str,
    engine_options: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    params: Any,
) -> list[Any]:
    """vLLM's outputs, from an engine that is gone with its memory afterwards."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(model=model, **engine_options)
    try:
        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return list(llm.generate(tokens, params))
    finally:
        llm.llm_engine.engine_core.shutdown()
        # The last reference: the next model needs the room.
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _model_config(options: MeasureOptions, model: str) -> ModelConfig:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=model, **options.engine_options).create_model_config()


def _check_vocabularies(
    options: MeasureOptions, target: ModelConfig, draft: ModelConfig
) -> None:
    size, draft_size = target.get_vocab_size(), draft.get_vocab_size()
    if size != draft_size:
        raise ConfigError(
            f"draft={options.draft!r}: has {draft_size} tokens, the target "
            f"{options.target!r} has {size}; choose a draft with the same vocabulary"
        )
    if options.num_ranks > size:
        raise ConfigError(
            f"num_ranks={options.num_ranks}: the models have {size} tokens"
        )


def _check_lengths(
    options: MeasureOptions,
    prompts: Sequence[Sequence[int]],
    target: ModelConfig,
    draft: ModelConfig,
) -> int:
    """Positions that the longest prompt, its continuation and one more token take."""
    longest = max(len(prompt) for prompt in prompts)
    needed = longest + options.max_tokens + 1  # the draft has to sample one
    for name, config in (("target", target), ("draft", draft)):
        if needed > config.max_model_len:
            raise ConfigError(
                f"the longest prompt has {longest} tokens: with max_tokens="
                f"{options.max_tokens} and one more it takes {needed} positions, the "
                f"{name} has {config.max_model_len}; shorten one of them"
                + (", or raise max_model_len" if options.max_model_len else "")
            )
    return needed
