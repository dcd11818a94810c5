"""What vLLM needs to know about drafts on the device before any of them is loaded."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.tokenizers import get_tokenizer

from vllm_treespec.config import (
    ConfigError,
    DraftModelConfig,
    LayerSkipConfig,
    TreeSpecConfig,
)
from vllm_treespec.core.propose.factory import make_shape
from vllm_treespec.integration.engine_args import from_vllm_config
from vllm_treespec.integration.sizing import max_num_drafting
from vllm_treespec.integration.skipped_layers import outside
from vllm_treespec.kernels.tree_attention import MAX_HEAD_SIZE


class TreeVllmConfig(VllmConfig):
    """vLLM's configuration, with room in the KV cache for what drafts write."""

    @property
    def num_lookahead_tokens(self) -> int:
        return num_lookahead_tokens(from_vllm_config(self))


def apply_drafts(vllm_config: VllmConfig, config: TreeSpecConfig) -> None:
    """Make room for the proposers that run a model.

    Raises:
        ConfigError: naming everything that keeps one of them from running.
    """
    if not config.device_proposers:
        return
    if problems := list(_problems(vllm_config, config)):
        raise ConfigError("treespec proposers cannot run:\n  " + "\n  ".join(problems))
    # The scheduler and the warm-up of every process ask the configuration itself.
    vllm_config.__class__ = TreeVllmConfig
    scheduler = vllm_config.scheduler_config
    # Drafts are fed the newest token as well, one more for each request.
    scheduler.max_num_scheduled_tokens = min(
        scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens,
        scheduler.max_num_batched_tokens - scheduler.max_num_seqs,
    )


def _problems(vllm_config: VllmConfig, config: TreeSpecConfig) -> Iterator[str]:
    target = vllm_config.model_config
    scheduler = vllm_config.scheduler_config
    for draft in config.device_proposers:
        model = target
        if isinstance(draft, DraftModelConfig):
            model = draft_model_config(draft, target)
            yield from _unfit(model, vllm_config)
        elif vllm_config.lora_config is not None:
            yield "layer_skip drafts without adapters: switch LoRA off"
        if isinstance(draft, LayerSkipConfig) and draft.skip is not None:
            for problem in outside(draft.skip, target.get_total_num_hidden_layers()):
                yield f"layer_skip: skip.{problem}"
        name = f"{draft.type} {model.model!r}"
        if vllm_config.parallel_config.data_parallel_size > 1 and (
            target.is_moe or model.is_moe
        ):
            yield (
                f"data_parallel_size={vllm_config.parallel_config.data_parallel_size} "
                "with mixture-of-experts models: ranks would have to draft in step"
            )
        num_rows = make_shape(draft, config.num_speculative_tokens, _CPU).num_rows
        num_reqs = max_num_drafting(vllm_config)
        needed = num_reqs * (max(num_rows) + 1)
        if needed > scheduler.max_num_batched_tokens:
            yield (
                f"{max(num_rows)} nodes a level for {num_reqs} requests need "
                f"max_num_batched_tokens >= {needed}, it is "
                f"{scheduler.max_num_batched_tokens}; raise it, or lower the draft's "
                "width, tree.max_rows or max_num_seqs"
            )
        shortest = min(model.max_model_len, target.max_model_len)
        if sum(num_rows) >= shortest:
            yield (
                f"{name} runs on {sum(num_rows)} tree nodes: must be fewer than the "
                f"{shortest} positions that it and the target have"
            )


def _unfit(draft: ModelConfig, vllm_config: VllmConfig) -> Iterator[str]:
    """What keeps this checkpoint from being loaded or from drafting."""
    name, target = f"draft_model {draft.model!r}", vllm_config.model_config
    folder = Path(draft.model)
    if vllm_config.load_config.load_format in WEIGHTS and folder.is_dir():
        patterns = WEIGHTS[vllm_config.load_config.load_format]
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            yield f"{name}: the folder has no weights ({', '.join(patterns)})"
    if (size := draft.get_head_size()) > MAX_HEAD_SIZE:
        yield f"{name}: head_size={size}: must be at most {MAX_HEAD_SIZE}"
    if target.skip_tokenizer_init:
        return
    try:
        ours, theirs = _vocabularies(draft, target)
    except (ValueError, OSError):
        return  # without tokenizers there is nothing to compare but the size
    meant = {number: token for token, number in ours.items()}
    shared = {number: token for token, number in theirs.items() if number in meant}
    others = sum(meant[number] != token for number, token in shared.items())
    # Families name a few of their special tokens anew from version to version.
    if others > len(shared) * OTHER_TOKENS:
        yield (
            f"{name}: {others} of {len(shared)} tokens are not those of the target "
            f"{target.model!r}; take a draft of the same family"
        )
    beyond = [number for number in theirs.values() if number >= target.get_vocab_size()]
    if len(beyond) > len(theirs) * OTHER_TOKENS:
        yield (
            f"{target.model!r} has {target.get_vocab_size()} tokens in its vocabulary, "
            f"its tokenizer {target.tokenizer!r} goes up to {max(beyond)}; take its own"
        )


OTHER_TOKENS = 0.01  # share of the vocabulary
WEIGHTS = {
    "auto": ("*.safetensors", "*.bin", "*.pt", "*.pth"),
    "safetensors": ("*.safetensors",),
    "pt": ("*.pt", "*.pth"),
}
_CPU = torch.device("cpu")


@functools.lru_cache(maxsize=8)
def num_lookahead_tokens(config: TreeSpecConfig) -> int:
    """KV slots that drafting needs behind the tokens scheduled for the target: the
    newest token's and those of the tree nodes that a draft runs on."""
    max_nodes = config.num_speculative_tokens
    return max(
        sum(make_shape(draft, max_nodes, _CPU).num_rows)
        for draft in config.device_proposers
    )


def draft_model_config(config: DraftModelConfig, target: ModelConfig) -> ModelConfig:
    """vLLM's configuration of the draft, with whatever it may take from the target.

    Raises:
        ConfigError: if the checkpoint cannot be a draft of this target.
    """
    where = f"draft_model {config.model!r}"
    try:
        draft = ModelConfig(
            model=config.model,
            runner="draft",
            tokenizer=target.tokenizer,
            tokenizer_mode=target.tokenizer_mode,
            trust_remote_code=target.trust_remote_code,
            dtype=target.dtype if config.dtype == "auto" else config.dtype,
            seed=target.seed,
            revision=config.revision,
            max_model_len=config.max_model_len,
            quantization=config.quantization,
            enforce_eager=target.enforce_eager,
            max_logprobs=target.max_logprobs,
            config_format=target.config_format,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if draft.get_vocab_size() != target.get_vocab_size():
        _check_same_tokens(where, draft, target)
    if draft.is_encoder_decoder or draft.is_hybrid or draft.is_attention_free:
        raise ConfigError(f"{where}: only decoders with attention in every layer draft")
    if draft.use_mla or draft.uses_mrope:
        raise ConfigError(f"{where}: MLA and M-RoPE are not supported on trees")
    return draft


def _vocabularies(draft: ModelConfig, target: ModelConfig) -> list[dict[str, int]]:
    """Token -> id, of both."""
    return [
        get_tokenizer(
            name, trust_remote_code=target.trust_remote_code, revision=revision
        ).get_vocab()
        for name, revision in (
            (draft.model, draft.revision),
            (target.tokenizer, target.tokenizer_revision),
        )
    ]


def _check_same_tokens(where: str, draft: ModelConfig, target: ModelConfig) -> None:
    """Models of one family pad one vocabulary to different sizes; others do not fit."""
    sizes = (
        f"{where}: {draft.get_vocab_size()} tokens in its vocabulary, the target "
        f"{target.model!r} has {target.get_vocab_size()}"
    )
    try:
        vocabularies = _vocabularies(draft, target)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{sizes}, and their tokenizers cannot be compared: {error}"
        ) from error
    if vocabularies[0] != vocabularies[1]:
        raise ConfigError(
            f"{sizes}, and their tokenizers differ; take a draft of the same family"
        )
