"""Turns the user's flag into a configuration that vLLM itself can carry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from vllm_treespec.config import METHOD, ConfigError, TreeSpecConfig
from vllm_treespec.integration.cpu_sizes import has_amx, parse_for_cpu, sizes_for
from vllm_treespec.integration.sizing import schedule_of, settle_schedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

PARSED = "_treespec"  # attribute of vLLM's configuration
WORKER = "vllm_treespec.integration.worker.TreeWorker"
# vLLM's own method that drafts without a model and allows async scheduling; its
# speculator is replaced before it is used.
NATIVE_METHOD = "ngram_gpu"

FP8_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2")
# Of vLLM's kv_cache_dtype: the others keep scales among the keys and values.
CACHE_DTYPES = ("auto", "float16", "bfloat16", *FP8_CACHES)


def wrap_create_engine_config(
    original: Callable[..., VllmConfig],
) -> Callable[..., VllmConfig]:
    """Rewrite ``method: treespec`` around the original, leave other methods alone."""

    @functools.wraps(original)
    def create_engine_config(
        self: EngineArgs, usage_context: Any = None, headless: bool = False
    ) -> VllmConfig:
        raw = requested(self)
        if raw is None:
            return original(self, usage_context, headless)
        config = _parse(raw, self.dtype)
        if self.worker_cls != "auto":
            raise ConfigError(
                f"worker_cls={self.worker_cls!r}: treespec brings its own worker, "
                "leave worker_cls at 'auto'"
            )
        with _rewritten(self, config):
            vllm_config = original(self, usage_context, headless)
        refuse_unsupported(vllm_config)
        # Imported late: vLLM loads plugins before it has read its own configuration.
        from vllm_treespec.integration.draft_config import apply_drafts

        settle_schedule(vllm_config, config)
        apply_drafts(vllm_config, config)
        return vllm_config

    return create_engine_config


def requested(args: EngineArgs) -> dict[str, Any] | None:
    """The speculative config, if it names treespec by either of vLLM's flags."""
    raw = dict(args.speculative_config or {})
    if args.spec_method is not None:
        raw.setdefault("method", args.spec_method)
    if raw.get("method") != METHOD:
        return None
    if args.spec_tokens is not None:
        raw.setdefault("num_speculative_tokens", args.spec_tokens)
    if args.spec_model is not None:
        raise ConfigError(
            f"--spec-model={args.spec_model!r}: treespec takes its drafts from "
            "tree.proposers in --speculative-config"
        )
    return raw


def _parse(raw: Mapping[str, Any], dtype: Any) -> TreeSpecConfig:
    """With the platform's sizes, wherever the user gave none."""
    from vllm.platforms import current_platform  # not while vLLM loads plugins

    if not current_platform.is_cpu():
        config = TreeSpecConfig.parse(raw)
        if config.min_probability is not None:
            raise ConfigError(
                f"tree.min_probability={config.min_probability}: a GPU's host does not "
                "know how likely nodes are, leave it out"
            )
        return config
    return parse_for_cpu(raw, sizes_for(dtype, has_amx=has_amx()))


def has_trees(vllm_config: VllmConfig) -> bool:
    """Whether the rewrite made this configuration."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.model == METHOD


def from_vllm_config(vllm_config: VllmConfig) -> TreeSpecConfig:
    """The configuration that the rewrite stored, in whatever process this is; parsed
    once for each."""
    kept = vars(vllm_config).get(PARSED)
    if kept is None:
        additional = vllm_config.additional_config
        assert isinstance(additional, dict), "written by the rewrite below"
        kept = TreeSpecConfig.parse(additional[METHOD])
        setattr(vllm_config, PARSED, kept)
    return cast(TreeSpecConfig, kept)


@contextmanager
def _rewritten(args: EngineArgs, config: TreeSpecConfig) -> Iterator[None]:
    additional = args.additional_config or {}
    if not isinstance(additional, Mapping):
        raise ConfigError(f"additional_config={additional!r}: must be a JSON object")
    replacement = {
        "speculative_config": {
            "method": NATIVE_METHOD,
            "model": METHOD,  # read by nobody else: how we know our own config
            "num_speculative_tokens": config.num_speculative_tokens,
            "num_speculative_tokens_per_batch_size": (
                # vLLM's ranks might choose differently, and drops it with a warning
                None if args.data_parallel_size > 1 else schedule_of(config)
            ),
        },
        "spec_method": None,
        "spec_tokens": None,
        "additional_config": {**additional, METHOD: config.to_dict()},
        "worker_cls": WORKER,
    }
    kept = {name: getattr(args, name) for name in replacement}
    for name, value in replacement.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        # Several API servers build their config from the same arguments.
        for name, value in kept.items():
            setattr(args, name, value)


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise one ConfigError naming every combination that cannot give right tokens."""
    if problems := list(_unsupported(vllm_config)):
        raise ConfigError(
            "treespec does not support this engine configuration:\n  "
            + "\n  ".join(problems)
        )


def _unsupported(vllm_config: VllmConfig) -> Iterator[str]:
    # Imported late: Triton is not needed to load plugins.
    from vllm_treespec.kernels.tree_attention import MAX_HEAD_SIZE

    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    if not vllm_config.use_v2_model_runner:
        yield (
            "Model Runner V1 was chosen: treespec needs V2, set "
            "VLLM_USE_V2_MODEL_RUNNER=1 and see vLLM's warning above for what "
            "keeps V2 off"
        )
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if (size := getattr(parallel, name)) > 1:
            yield f"{name}={size}: must be 1"
    for name in ("enable_dbo", "enable_batch_sharded_sampling"):
        if getattr(parallel, name):
            yield f"{name}=True: switch it off"
    if vllm_config.kv_transfer_config is not None:
        yield "kv_transfer_config: KV connectors would send uncommitted tree KV"
    if vllm_config.watermark_config is not None:
        yield "watermark_config: watermarks are not defined on trees"
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in CACHE_DTYPES:
        yield f"kv_cache_dtype={cache_dtype!r}: use one of {', '.join(CACHE_DTYPES)}"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill=True: switch it off"
    if model.is_encoder_decoder:
        yield "encoder-decoder models keep KV that trees do not cover"
    if model.is_hybrid or model.is_attention_free:
        yield "recurrent layers have one state per request, not one per tree node"
    elif (size := model.get_head_size()) > MAX_HEAD_SIZE and not model.use_mla:
        yield f"head_size={size}: the tree kernel takes at most {MAX_HEAD_SIZE}"
    if model.use_mla:
        yield "multi-head latent attention (MLA) has no tree kernel"
    if model.uses_mrope:
        yield "M-RoPE positions are not defined on trees"
    if model.is_mm_prefix_lm:
        yield "bidirectional attention inside images or prefixes has no tree kernel"
    if model.rswa_window is not None:
        yield f"rswa_window={model.rswa_window}: this window has no tree kernel"
    if model.return_sampling_mask:
        yield "return_sampling_mask=True: the masks of a path are not gathered"
    if model.runner_type != "generate":
        yield f"runner={model.runner_type!r}: only generation decodes"
