"""Which sub-layers the target should skip when it drafts for itself.

Draft & Verify (arXiv:2309.08168) searches by Bayesian optimisation; here by Optuna's
tree-structured Parzen estimator, over one choice per sub-layer. A trial drafts with a
set in the real engine and counts what is accepted; what a set saves comes from the time
that each sub-layer takes there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_treespec.config import METHOD, ConfigError, LayerSkipConfig, SkipSet
from vllm_treespec.core.propose.layer_costs import LayerCosts, best_depth
from vllm_treespec.integration.prompts import RunOptions, make_prompts, read_texts

if TYPE_CHECKING:
    import optuna

ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos"
NUM_DRAFTS = "vllm:spec_decode_num_drafts"


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions(RunOptions):
    """What is searched, and on what."""

    model: str
    """Checkpoint directory or name of the target."""

    num_prompts: int = 8
    max_tokens: int = 64

    trials: int = 100
    """Sets that are tried, those of earlier runs of the same study included."""

    depth: int = 6
    """Longest drafted path in tokens."""

    width: int = 8
    """Nodes per level that the draft runs on."""

    num_nodes: int = 32
    """Draft nodes verified per request and step."""

    study: str | None = None
    """File that remembers the trials, to go on later; None: none is kept."""

    def _problems(self) -> Iterator[str]:
        yield from super(TuneOptions, self)._problems()
        if self.trials < 1:
            yield f"trials={self.trials}: must be >= 1"
        options = {"depth": self.depth, "width": self.width}
        yield from LayerSkipConfig.problems(options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a set did."""

    skip: SkipSet
    accepted_at: tuple[float, ...]  # [depth], share of steps that accept as many
    ratio: float  # time of a draft's forward, of the target's
    depth: int
    speedup: float

    @property
    def tokens_per_step(self) -> float:
        """With drafts of the best depth, the target's own token included."""
        return 1 + sum(self.accepted_at[: self.depth])


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What came out."""

    best: Outcome
    compared: dict[str, Outcome]  # by name, untuned ones
    num_trials: int
    options: TuneOptions

    def write(self, path: str | Path) -> None:
        """JSON for the ``skip`` option of ``layer_skip``."""
        content = {
            **self.best.skip.model_dump(),
            "expected_speedup": self.best.speedup,
            "tokens_per_step": self.best.tokens_per_step,
            "depth": self.best.depth,
            "cost_ratio": self.best.ratio,
            "num_trials": self.num_trials,
            "vllm_treespec": version("vllm-treespec"),
        }
        Path(path).write_text(json.dumps(content, indent=2) + "\n")


def tune_layer_skip(options: TuneOptions) -> Tuned:
    """Search for the set with the best expected speed-up.

    Raises:
        ConfigError: before the model is loaded if the data will not do, or if the study
            is one of another model or other options.
    """
    optuna = _import_optuna()
    texts = read_texts(options)
    engine = _Engine(options, texts)
    try:
        study = _open_study(optuna, options, engine)
        left = options.trials - len(study.get_trials(states=[_complete(optuna)]))
        if left > 0:
            study.optimize(
                lambda trial: _try(trial, engine), n_trials=left, show_progress_bar=True
            )
        best = engine.skip_set(study.best_params)
        return Tuned(
            best=engine.outcome(best),
            compared={
                name: engine.outcome(engine.own(skip))
                for name, skip in untuned_sets(engine.num_layers).items()
            },
            num_trials=len(study.get_trials(states=[_complete(optuna)])),
            options=options,
        )
    finally:
        engine.close()


def untuned_sets(num_layers: int) -> dict[str, SkipSet]:
    """Sets to start from and to compare with: whole layers, evenly spaced."""
    inner = range(1, num_layers - 1)
    spaced = {"0%": (), "25%": tuple(inner[1::4]), "50%": tuple(inner[::2])}
    return {name: SkipSet(attention=each, mlp=each) for name, each in spaced.items()}


def _try(trial: optuna.Trial, engine: _Engine) -> float:
    chosen = {
        name: trial.suggest_categorical(name, [False, True])
        for name in _choices(SkipSet(), engine.num_layers)
    }
    skip = engine.skip_set(chosen)
    if set(skip.attention) & set(skip.mlp) == set(range(engine.num_layers)):
        return 0.0  # nothing is left to draft with
    return engine.outcome(skip).speedup


PARTS = ("attention", "mlp")


def _choices(skip: SkipSet, num_layers: int) -> dict[str, bool]:
    """A set as the study has it: ``{"attention.0": True, ...}``."""
    return {
        f"{part}.{n}": n in getattr(skip, part)
        for part in PARTS
        for n in range(num_layers)
    }


def _open_study(optuna: Any, options: TuneOptions, engine: _Engine) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = None
    if options.study is not None:
        backend = optuna.storages.journal.JournalFileBackend(options.study)
        storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(
        direction="maximize",
        study_name="layer_skip",
        storage=storage,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=options.seed),
    )
    mine = {
        "fingerprint": engine.fingerprint,
        **{
            name: getattr(options, name)
            for name in ("data", "num_prompts", "max_tokens", "prompt_tokens", "seed")
        },
        **{name: getattr(options, name) for name in ("depth", "width", "num_nodes")},
    }
    if not study.user_attrs:
        study.set_user_attr("run", mine)
        # Trials are compared by the same times, also when the study goes on elsewhere.
        study.set_user_attr("costs", asdict(engine.measure_costs()))
        for skip in untuned_sets(engine.num_layers).values():
            study.enqueue_trial(_choices(skip, engine.num_layers))
    elif (found := study.user_attrs["run"]) != mine:
        different = [name for name in mine if found.get(name) != mine[name]]
        raise ConfigError(
            f"study={options.study!r}: was made with other values of {different}; name "
            "another file, or give the same values"
        )
    costs = study.user_attrs["costs"]
    engine.costs = LayerCosts(
        tuple(costs["attention"]), tuple(costs["mlp"]), costs["other"]
    )
    return study


class _Engine:
    """vLLM with ``layer_skip`` whose set can be changed."""

    costs: LayerCosts

    def __init__(self, options: TuneOptions, texts: Sequence[str]) -> None:
        from vllm import LLM, SamplingParams
        from vllm.engine.arg_utils import EngineArgs

        model_config = EngineArgs(
            model=options.model, **options.engine_options
        ).create_model_config()
        prompts = make_prompts(options, texts, model_config)
        self._prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        self._params = SamplingParams(
            temperature=0.0, max_tokens=options.max_tokens, detokenize=False
        )
        self._options = options
        proposer = {
            "type": "layer_skip",
            "depth": options.depth,
            "width": options.width,
            "early_stop": False,  # all depths are measured
        }
        self._llm = LLM(
            model=options.model,
            speculative_config={
                "method": METHOD,
                "num_speculative_tokens": options.num_nodes,
                "tree": {
                    "proposers": [proposer],
                    "adaptive": False,
                    "max_rows": 2**20,
                },
            },
            disable_log_stats=False,
            **options.engine_options,
        )
        described = self._ask("describe")
        self.num_layers: int = described["num_layers"]
        self.fingerprint: str = described["fingerprint"]
        self._outcomes: dict[SkipSet, Outcome] = {}

    def skip_set(self, chosen: dict[str, bool]) -> SkipSet:
        """A study's choices as a set of this model."""
        attention, mlp = (
            tuple(n for n in range(self.num_layers) if chosen.get(f"{part}.{n}"))
            for part in PARTS
        )
        return self.own(SkipSet(attention=attention, mlp=mlp))

    def own(self, skip: SkipSet) -> SkipSet:
        """The set, said to be this model's."""
        return skip.model_copy(
            update={
                "model": self._options.model,
                "num_layers": self.num_layers,
                "fingerprint": self.fingerprint,
            }
        )

    def measure_costs(self) -> LayerCosts:
        """Seconds per part of a draft's forward that skips nothing, as drafts run."""
        self._ask("change", [], [], True)
        self._generate()
        attention, mlp, other = self._ask("part_seconds")
        return LayerCosts(tuple(attention), tuple(mlp), other)

    def outcome(self, skip: SkipSet) -> Outcome:
        """Draft with the set, or remember when that was done."""
        if skip not in self._outcomes:
            self._ask("change", skip.attention, skip.mlp)
            before = self._counts()
            self._generate()
            counts = [
                new - old for new, old in zip(self._counts(), before, strict=True)
            ]
            num_drafts, *accepted = counts
            accepted_at = tuple(each / max(num_drafts, 1) for each in accepted)
            ratio = self.costs.ratio(skip)
            depth, speedup = best_depth(accepted_at, ratio)
            self._outcomes[skip] = Outcome(
                skip=skip,
                accepted_at=accepted_at,
                ratio=ratio,
                depth=depth,
                speedup=speedup,
            )
        return self._outcomes[skip]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _generate(self) -> None:
        self._llm.generate(self._prompts, self._params, use_tqdm=False)

    def _counts(self) -> list[float]:
        """Steps with drafts, then of them those that accepted as many tokens."""
        found = {each.name: each for each in self._llm.get_metrics()}
        accepted: Any = found[ACCEPTED_AT]
        drafts: Any = found[NUM_DRAFTS]
        return [drafts.value, *accepted.values[: self._options.depth]]

    def _ask(self, method: str, *arguments: Any) -> Any:
        """The first worker's answer; all of them do it."""
        return self._llm.collective_rpc(
            "treespec_layer_skip", args=(method, *arguments)
        )[0]


def _complete(optuna: Any) -> Any:
    return optuna.trial.TrialState.COMPLETE


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            f"optuna cannot be imported ({error}); pip install 'vllm-treespec[tune]'"
        ) from error
    return optuna
