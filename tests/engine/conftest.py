"""The real engine, in this process, with tiny random models."""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_CPU_CI_ENV"] = "1"  # no warm-up
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from vllm_treespec.integration import speculator as speculator_module
from vllm_treespec.testing.planted import PlantedProposer

VOCAB_SIZE = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    # Small weights degenerate into repetition, which hides bugs.
    "initializer_range": 0.25,
}
WHOLE_TREES: dict[str, Any] = {"max_rows": 2**16, "draft_timeout_ms": 60_000}
if not torch.cuda.is_available():
    WHOLE_TREES["min_probability"] = 0.0
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=24),
    "gemma2": lambda: transformers.Gemma2Config(
        **{**SHAPE, "num_hidden_layers": 4, "tie_word_embeddings": True},
        query_pre_attn_scalar=32,
        sliding_window=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    ),
    "granite": lambda: transformers.GraniteConfig(
        **SHAPE, residual_multiplier=0.5, logits_scaling=0.5
    ),
    # Every other layer has a window, and all of them have sinks.
    "granite-sinks": lambda: transformers.GraniteConfig(
        **SHAPE,
        residual_multiplier=0.5,
        logits_scaling=0.5,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        attention_sinks=True,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2
    ),
}


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Directory of a tiny random model of that architecture."""
    made: dict[str, str] = {}

    def path(architecture: str) -> str:
        if architecture not in made:
            torch.manual_seed(0)
            config = ARCHITECTURES[architecture]()
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            directory = tmp_path_factory.mktemp(architecture)
            weights = model.float().state_dict()
            if getattr(config, "attention_sinks", False):
                # Transformers has no sinks in this architecture, vLLM has.
                for layer in range(config.num_hidden_layers):
                    name = f"model.layers.{layer}.self_attn.sinks"
                    weights[name] = torch.linspace(-1, 3, config.num_attention_heads)
            model.save_pretrained(directory, state_dict=weights)
            made[architecture] = str(directory)
        return made[architecture]

    return path


@pytest.fixture(scope="session")
def deep_model_path(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], str]:
    """Directory of a random model of four layers, whose later ones say less."""
    made: dict[str, str] = {}

    def path(architecture: str) -> str:
        if architecture not in made:
            torch.manual_seed(0)
            config = ARCHITECTURES[architecture]()
            config.num_hidden_layers = 4
            if getattr(config, "layer_types", None):
                config.layer_types = (config.layer_types * 2)[:4]
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        weight *= 0.5
            directory = tmp_path_factory.mktemp(f"deep-{architecture}")
            model.float().save_pretrained(directory)
            made[architecture] = str(directory)
        return made[architecture]

    return path


@pytest.fixture(scope="session")
def draft_path(
    model_path: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Directory of a model that often, not always, agrees with that architecture's."""
    made: dict[tuple[str, int], str] = {}

    def path(architecture: str, seed: int = 0, noise: float = 0.05) -> str:
        key = (architecture, seed)
        if key not in made:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                model_path(architecture)
            )
            torch.manual_seed(seed)
            with torch.no_grad():
                for weight in model.parameters():
                    weight += noise * weight.std() * torch.randn_like(weight)
            directory = tmp_path_factory.mktemp(f"{architecture}-draft{seed}-")
            model.save_pretrained(directory)
            made[key] = str(directory)
        return made[key]

    return path


@dataclass
class Engine:
    """A started engine and what its trees did."""

    llm: LLM
    proposers: list[Any] = field(default_factory=list)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Any
    ) -> list[list[list[int]]]:
        """Output token ids per prompt and per choice of ``n``."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            params,
            use_tqdm=False,
        )
        return [
            [list(choice.token_ids) for choice in output.outputs] for output in outputs
        ]

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 24, **options: Any
    ) -> list[list[int]]:
        """Greedy output token ids per prompt."""
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, detokenize=False, **options
        )
        return [choices[0] for choices in self.generate(prompts, params)]

    def metric(self, name: str) -> float:
        """Sum of a counter over its labels, as vLLM reports it."""
        metrics = [each for each in self.llm.get_metrics() if each.name == name]
        assert metrics, f"no metric {name}"
        return sum(each.value for each in metrics)  # type: ignore[attr-defined]

    @property
    def runner(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler


@dataclass
class AcceptanceLog:
    """Accepted paths, recorded in the engine's own rejection sampler."""

    lengths: list[int] = field(default_factory=list)
    off_first_branch: int = 0  # accepted multi-token paths not made of first children

    def record(self, nodes: list[list[int]], lengths: list[int]) -> None:
        for path, length in zip(nodes, lengths, strict=True):
            self.lengths.append(length)
            taken = path[1 : length + 1]
            if length > 1 and taken != list(range(1, length + 1)):
                self.off_first_branch += 1


@pytest.fixture
def acceptance(monkeypatch: pytest.MonkeyPatch) -> AcceptanceLog:
    """What the target accepted, seen from inside the engine."""
    from vllm_treespec.integration.rejection_sampler import TreeRejectionSampler

    log = AcceptanceLog()
    original = TreeRejectionSampler.__call__

    def verify(self: Any, logits: Any, input_batch: Any, *rest: Any) -> Any:
        result = original(self, logits, input_batch, *rest)
        paths, count = self._speculator.paths, input_batch.num_reqs
        lengths = paths.lengths[:count].tolist()
        log.record(paths.nodes[:count].tolist(), lengths)
        assert self._speculator._counts.lengths.tolist() == lengths
        return result

    monkeypatch.setattr(TreeRejectionSampler, "__call__", verify)
    return log


@pytest.fixture(scope="session", autouse=True)
def thaw() -> Iterator[None]:
    """What ``start`` froze is collected when Python ends."""
    yield
    gc.unfreeze()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """Start an engine; ``tree`` is the flag's object, ``truths`` plants adversaries."""
    running: list[Engine] = []

    def stop() -> None:
        if not running:
            return
        if (llm := running.pop().llm) is not None:  # else its start-up failed
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
        # vLLM collects garbage a dozen times per engine; what is left is not garbage.
        gc.freeze()

    def start(
        model: str,
        *,
        tree: dict[str, Any] | None = None,
        truths: Sequence[Sequence[int]] | None = None,
        num_speculative_tokens: int = 8,
        async_scheduling: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> Engine:
        stop()
        engine = Engine(llm=None)  # type: ignore[arg-type]  # set below
        running.append(engine)
        if truths is not None:
            tree = {"kernels": "auto", **(tree or {})}
            planted = PlantedProposer(
                truths,
                vocab_size=VOCAB_SIZE,
                max_nodes=num_speculative_tokens,
                seed=seed,
            )
            engine.proposers.append(planted)
            monkeypatch.setattr(
                speculator_module, "make_proposers", lambda *_, **__: [planted]
            )
        speculative = tree and {
            "method": "treespec",
            "num_speculative_tokens": num_speculative_tokens,
            # Whole trees, however many requests and however busy the machine; the
            # limits have their own tests.
            "tree": {**WHOLE_TREES, **tree},
        }
        if async_scheduling:
            options["async_scheduling"] = True
            options["additional_config"] = {"treespec_cpu_host_async": True}
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 2**24,
            "distributed_executor_backend": "uni",
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "enable_prefix_caching": False,
        }
        engine.llm = LLM(
            model=model, speculative_config=speculative, **{**defaults, **options}
        )
        return engine

    yield start
    stop()


@pytest.fixture
def fp8_caches() -> None:
    """Skips where vLLM itself has none, with or without trees."""
    if not (torch.cuda.is_available() or torch.cpu._is_avx512_supported()):
        pytest.skip("vLLM's CPU backend stores fp8 caches with AVX-512 only")


@pytest.fixture(scope="session")
def answers() -> dict[str, list[list[int]]]:
    """What engines without speculation said, by what they were asked."""
    return {}


@pytest.fixture
def plain_greedy(
    start: Callable[..., Engine], answers: dict[str, list[list[int]]]
) -> Callable[..., list[list[int]]]:
    """Greedy output token ids without speculation. Asked once: starting an engine is
    most of what many tests do."""

    def ask(
        model: str,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 24,
        params: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[list[int]]:
        options.pop("async_scheduling", None)  # changes no token
        question = repr((model, prompts, max_tokens, params, sorted(options.items())))
        if question not in answers:
            engine = start(model, **options)
            answers[question] = engine.greedy(prompts, max_tokens, **(params or {}))
        return answers[question]

    return ask


@pytest.fixture
def prompts() -> Callable[..., list[list[int]]]:
    """Random prompts of awkward lengths, the same for the same arguments."""

    def make(
        count: int = 6, shortest: int = 3, longest: int = 40, seed: int = 0
    ) -> list[list[int]]:
        rng = random.Random(seed)
        return [
            [
                rng.randrange(2, VOCAB_SIZE)
                for _ in range(rng.randint(shortest, longest))
            ]
            for _ in range(count)
        ]

    return make
