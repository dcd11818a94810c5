"""Every place where treespec meets vLLM, and the tools that check and use it.

``PATCHES`` are replaced; ``HOOKS`` are methods that our classes override or call. Both
carry the parameters they were written against, because a wrong token is worse than no
speculation: a seam that moved is an error, not a guess.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_treespec.integration import carrier, grammar, metrics
from vllm_treespec.integration.endpoint_plugin import wrap_load_endpoint_plugins
from vllm_treespec.integration.engine_args import wrap_create_engine_config
from vllm_treespec.integration.namespaces import wrap_note_namespaces
from vllm_treespec.integration.request_options import (
    wrap_update_after_schedule,
    wrap_validate_params,
    wrap_validate_spec_decode,
)
from vllm_treespec.integration.sessions import wrap_handle_stopped_request


class SeamError(RuntimeError):
    """vLLM no longer looks the way a seam expects."""


@dataclass(frozen=True, slots=True)
class Hook:
    """A vLLM callable whose parameters we rely on."""

    target: str  # "module:attribute"
    parameters: tuple[str, ...]  # what we were written against, leading ones suffice
    why: str  # what we do there

    def check(self) -> None:
        """
        Raises:
            SeamError: if the target is gone or takes other parameters.
        """
        current = _resolve(self.target)[2]
        found = tuple(inspect.signature(current).parameters)
        if found[: len(self.parameters)] != self.parameters:
            raise SeamError(
                f"{self.target} is {current.__module__}.{current.__qualname__} and takes "
                f"{found}, treespec expects {self.parameters}"
            )


@dataclass(frozen=True, slots=True)
class Patch:
    """A vLLM callable that we replace."""

    target: str  # "module:attribute", as the *caller* looks it up
    parameters: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]  # original -> replacement
    why: str  # what vLLM lacks; a hook for it would delete this patch

    def install(self) -> None:
        owner, name, current = _resolve(self.target)
        if ORIGINAL in vars(current):
            return
        self.check()
        replacement = self.wrap(current)
        setattr(replacement, ORIGINAL, current)
        setattr(owner, name, replacement)

    def uninstall(self) -> None:
        owner, name, current = _resolve(self.target)
        setattr(owner, name, vars(current).get(ORIGINAL, current))

    def check(self) -> None:
        """
        Raises:
            SeamError: as of a hook; another plugin's wrapper may hand on anything.
        """
        kinds = {
            each.kind
            for each in inspect.signature(_resolve(self.target)[2]).parameters.values()
        }
        if not kinds >= {
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        }:
            Hook(self.target, self.parameters, self.why).check()


@dataclass(frozen=True, slots=True)
class FieldPatch:
    """The type of a dataclass field that we replace, for decoders made later."""

    target: str  # "module:class.field"
    expected: Any
    replacement: Any
    why: str

    def install(self) -> None:
        annotations, name = self._find()
        if annotations[name] != self.replacement:
            self.check()
            annotations[name] = self.replacement

    def uninstall(self) -> None:
        annotations, name = self._find()
        annotations[name] = self.expected

    def check(self) -> None:
        """
        Raises:
            SeamError: if the field is gone or of another type.
        """
        annotations, name = self._find()
        if annotations.get(name) not in (self.expected, self.replacement):
            raise SeamError(
                f"{self.target} is {annotations.get(name)}, treespec expects {self.expected}"
            )

    def _find(self) -> tuple[dict[str, Any], str]:
        path, _, name = self.target.rpartition(".")
        owner, attribute, _ = _resolve(path)
        return getattr(owner, attribute).__annotations__, name


ORIGINAL = "__treespec_original__"

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_GRAMMARS = "vllm.v1.structured_output:StructuredOutputManager"
_LOGGERS = "vllm.v1.metrics.loggers"
PATCHES = (
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        parameters=("self", "usage_context", "headless"),
        wrap=wrap_create_engine_config,
        why="the speculative methods are a closed list, so ours is rewritten to one",
    ),
    Patch(
        target="vllm.plugins:load_endpoint_plugins",
        parameters=("supported_tasks",),
        wrap=wrap_load_endpoint_plugins,
        why="endpoints need VLLM_PLUGINS, which switches other plugins off",
    ),
    Patch(
        target="vllm.sampling_params:SamplingParams._validate_spec_decode",
        parameters=("self", "speculative_config"),
        wrap=wrap_validate_spec_decode,
        why="min_p and logit_bias are refused with any speculative method",
    ),
    Patch(
        target="vllm.v1.engine.input_processor:InputProcessor._validate_params",
        parameters=("self", "params", "supported_tasks"),
        wrap=wrap_validate_params,
        why="nobody looks into a request's extra_args before they are needed",
    ),
    Patch(
        target=(
            "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule"
        ),
        parameters=("self", "scheduler_output"),
        wrap=wrap_update_after_schedule,
        why="all requests get the same number of placeholders for drafts",
    ),
    Patch(
        target=f"{_SCHEDULER}.add_request",
        parameters=("self", "request"),
        wrap=carrier.wrap_add_request,
        why="a request's statistics take placeholders for drafts",
    ),
    Patch(
        target=f"{_SCHEDULER}.update_from_output",
        parameters=("self", "scheduler_output", "model_runner_output"),
        wrap=carrier.wrap_update_from_output,
        why="what a worker counts has no way to the metrics",
    ),
    Patch(
        target=f"{_SCHEDULER}.make_spec_decoding_stats",
        parameters=(
            "self",
            "spec_decoding_stats",
            "num_draft_tokens",
            "num_accepted_tokens",
            "num_invalid_spec_tokens",
            "request_id",
        ),
        wrap=carrier.wrap_make_spec_decoding_stats,
        why="placeholders without a draft count as a draft",
    ),
    Patch(
        target=f"{_SCHEDULER}.make_stats",
        parameters=("self", "spec_decoding_stats"),
        wrap=carrier.wrap_make_stats,
        why="what a worker counts has no way to the metrics",
    ),
    Patch(
        target=f"{_SCHEDULER}._update_after_schedule",
        parameters=("self", "scheduler_output"),
        wrap=wrap_note_namespaces,
        why="workers are not told a request's cache_salt",
    ),
    Patch(
        target=f"{_SCHEDULER}._handle_stopped_request",
        parameters=("self", "request"),
        wrap=wrap_handle_stopped_request,
        why="a turn that ends inside an accepted path counts tokens that it dropped",
    ),
    Patch(
        target=f"{_SCHEDULER}.update_draft_token_ids",
        parameters=("self", "draft_token_ids"),
        wrap=grammar.wrap_update_draft_token_ids,
        why="drafts have no parents",
    ),
    Patch(
        target=f"{_SCHEDULER}.update_draft_token_ids_in_output",
        parameters=("self", "draft_token_ids", "scheduler_output"),
        wrap=grammar.wrap_update_draft_token_ids,
        why="drafts have no parents",
    ),
    Patch(
        target=f"{_GRAMMARS}.validate_tokens",
        parameters=("self", "request", "spec_tokens"),
        wrap=grammar.wrap_validate_tokens,
        why="drafts are cut to a valid chain",
    ),
    Patch(
        target=f"{_GRAMMARS}.grammar_bitmask",
        parameters=(
            "self",
            "requests",
            "structured_output_request_ids",
            "scheduled_spec_decode_tokens",
        ),
        wrap=grammar.wrap_grammar_bitmask,
        why="masks follow a chain of drafts",
    ),
    FieldPatch(
        target="vllm.v1.metrics.stats:SchedulerStats.spec_decoding_stats",
        expected=SpecDecodingStats | None,
        replacement=carrier.TreeDecodingStats | None,
        why="statistics are decoded by declared type, and this one has no room",
    ),
    Patch(
        target=f"{_LOGGERS}:PrometheusStatLogger.__init__",
        parameters=("self", "vllm_config", "engine_indexes"),
        wrap=metrics.wrap_prometheus_logger,
        why="no hook adds series to vLLM's, whatever they are shown by",
    ),
    Patch(
        target=f"{_LOGGERS}:LoggingStatLogger.__init__",
        parameters=("self", "vllm_config", "engine_index"),
        wrap=metrics.wrap_text_logger,
        why="vLLM's line has a number for each node",
    ),
)

_GPU = "vllm.v1.worker.gpu"
HOOKS = (
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.sample_tokens",
        ("self", "grammar_output"),
        "the step's report goes along with its tokens",
    ),
    Hook(
        "vllm.v1.outputs:AsyncModelRunnerOutput.get_output",
        ("self",),
        "the report is finished once the tokens have been copied",
    ),
    Hook(
        "vllm.v1.metrics.stats:RequestSpecDecodeMetrics.observe",
        ("self", "num_draft_tokens", "num_accepted", "detailed"),
        "steps without a tree are not counted as drafted",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.init_device",
        ("self",),
        "the speculator is put in place once the model runner exists",
    ),
    Hook(
        f"{_GPU}.spec_decode.speculator:DraftModelSpeculator.load_model",
        ("self", "target_model"),
        "attention layers are bound to the trees before the model state is made",
    ),
    Hook(
        f"{_GPU}.spec_decode.speculator:BaseSpeculator.propose",
        (
            "self",
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
            "num_sampled",
            "num_rejected",
            "last_sampled",
            "next_prefill_tokens",
            "temperature",
            "seeds",
            "dp_sync_state",
            "dummy_run",
            "skip_attn_for_dummy_run",
            "mm_inputs",
            "is_profile",
            "num_speculative_tokens",
        ),
        "proposers run and trees are built",
    ),
    Hook(
        f"{_GPU}.cudagraph_utils:CudaGraphManager.dispatch",
        (
            "self",
            "num_reqs",
            "num_tokens",
            "uniform_token_count",
            "num_active_loras",
            "max_query_len",
            "num_ubatches",
        ),
        "decode batches are replayed from the graphs that were chosen for them",
    ),
    Hook(
        f"{_GPU}.model_states:resolve_model_state_cls",
        ("vllm_config", "model"),
        "models with recurrent or cross-attention state are refused",
    ),
    Hook(
        f"{_GPU}.model_states.default:DefaultModelState.add_request",
        ("self", "req_index", "new_req_data"),
        "a slot's tree and history start over",
    ),
    Hook(
        f"{_GPU}.model_states.interface:ModelState.remove_request",
        ("self", "req_id"),
        "proposers keep what the request taught",
    ),
    Hook(
        f"{_GPU}.model_states.interface:ModelState.initialize_kv_cache",
        ("self", "kv_cache_config", "block_tables"),
        "the caches that commit compacts become known",
    ),
    Hook(
        f"{_GPU}.model_states.default:DefaultModelState.prepare_attn",
        ("self", "input_batch", "cudagraph_mode", "block_tables", "slot_mappings"),
        "trees are lined up with the batch, positions become depths",
    ),
    Hook(
        f"{_GPU}.model_states.interface:ModelState.preprocess_state",
        (
            "self",
            "input_batch",
            "block_tables",
            "kv_cache_config",
            "num_computed_tokens",
        ),
        "the last thing before adapters are mapped to a batch",
    ),
    Hook(
        f"{_GPU}.lora_utils:LoraState.make_lora_inputs",
        ("self", "req_ids", "idx_mapping", "num_scheduled_tokens"),
        "adapters are mapped to nodes instead of requests",
    ),
    Hook(
        "vllm.distributed.aux_output_connector.worker:"
        "AuxOutputWorkerConnector.prepare_output",
        ("self", "input_batch"),
        "routed experts are returned from the accepted path's rows",
    ),
    Hook(
        f"{_GPU}.model_states.interface:ModelState.custom_sampler",
        ("self", "sampler"),
        "the rejection sampler is ours",
    ),
    Hook(
        f"{_GPU}.model_states.interface:ModelState.postprocess_state",
        ("self", "idx_mapping", "num_sampled", "num_computed_tokens"),
        "accepted paths are committed",
    ),
    Hook(
        f"{_GPU}.sample.sampler:Sampler.sample",
        (
            "self",
            "logits",
            "expanded_idx_mapping",
            "idx_mapping",
            "idx_mapping_np",
            "pos",
            "input_ids",
            "expanded_local_pos",
            "seq_lens_upper_bound_np",
            "return_logprobs",
        ),
        "the target's pick at every node",
    ),
    Hook(
        f"{_GPU}.sample.penalties:apply_penalties",
        (
            "logits",
            "expanded_idx_mapping",
            "token_ids",
            "expanded_local_pos",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
            "prompt_bin_mask",
            "output_bin_counts",
        ),
        "penalties are counted along a node's path, from vLLM's own counts",
    ),
    Hook(
        f"{_GPU}.sample.bad_words:apply_bad_words",
        (
            "logits",
            "expanded_idx_mapping",
            "bad_word_token_ids",
            "bad_word_offsets",
            "num_bad_words",
            "all_token_ids",
            "prompt_len",
            "total_len",
            "input_ids",
            "expanded_local_pos",
            "max_num_bad_words",
        ),
        "bad words are looked for along a node's path",
    ),
    Hook(
        f"{_GPU}.sample.sampler:Sampler.get_logprobs_dims",
        ("self", "idx_mapping_np"),
        "how many log-probs are wanted",
    ),
    Hook(
        f"{_GPU}.sample.logprob:compute_topk_scores",
        (
            "logits",
            "num_logprobs",
            "sampled_token_ids",
            "cu_num_logits",
            "logprob_token_ids_state",
            "expanded_idx_mapping",
            "max_per_req_token_ids",
            "logits_mode",
        ),
        "log-probs of the accepted path",
    ),
    Hook(
        f"{_GPU}.input_batch:get_num_sampled_and_rejected",
        ("num_sampled", "seq_lens", "cu_num_logits", "idx_mapping", "prefill_len"),
        "vLLM's own accounting of rejected drafts",
    ),
    Hook(
        f"{_GPU}.spec_decode.rejection_sampler:get_max_chunk_logits",
        ("vocab_size",),
        "logits are processed in chunks of vLLM's size",
    ),
    Hook(
        f"{_GPU}.spec_decode.speculator:DraftModelSpeculator.set_attn",
        ("self", "model_state", "kv_cache_config", "block_tables"),
        "draft models learn where their KV cache lies",
    ),
    Hook(
        "vllm.config:VllmConfig.num_lookahead_tokens.fget",
        ("self",),
        "the KV cache has room for what draft models write",
    ),
    Hook(
        "vllm.model_executor.model_loader:get_model",
        ("vllm_config", "model_config", "prefix"),
        "draft models are loaded",
    ),
    Hook(
        "vllm.model_executor.model_loader.reload.inplace:reload_weights",
        (
            "vllm_config",
            "model",
            "weights_iterator",
            "weights_path",
            "is_checkpoint_format",
        ),
        "draft models are loaded again after their weights were discarded",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.wake_up",
        ("self", "tags"),
        "draft models are loaded again after their weights were discarded",
    ),
    Hook(
        "vllm.forward_context:set_forward_context",
        ("attn_metadata", "vllm_config", "num_tokens", "num_tokens_across_dp"),
        "draft models run on batches of their own",
    ),
    Hook(
        "vllm.v1.attention.backends.registry:register_backend",
        ("backend", "class_path", "is_mamba"),
        "the attention backend is ours",
    ),
)


def install() -> None:
    """Install all patches.

    Raises:
        SeamError: naming all that moved, before anything is replaced.
    """
    if _installed:
        return  # vLLM may load plugins more than once per process
    if found := moved(PATCHES):
        raise SeamError("; ".join(found))
    for patch in PATCHES:
        patch.install()
    _installed.append(True)


_installed: list[bool] = []


def moved(seams: Sequence[Hook | Patch | FieldPatch]) -> list[str]:
    """What is wrong with each that is not as expected."""
    problems = []
    for seam in seams:
        try:
            seam.check()
        except SeamError as error:
            problems.append(str(error))
    return problems


def check_hooks() -> None:
    """Refuse to run on a vLLM that moved.

    Raises:
        SeamError: naming all hooks that are gone or changed.
    """
    if found := moved(HOOKS):
        raise SeamError("; ".join(found))


def _resolve(target: str) -> tuple[Any, str, Callable[..., Any]]:
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    try:
        owner = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name, getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise SeamError(f"{target} is gone: {error}") from error
