"""User-facing configuration: parsed once, validated once, then immutable."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")

METHOD = "treespec"
MAX_NODES = 1024
MAX_PROPOSERS = 31  # one bit each
# Of one proposer for each node of a tree that several share. Four are no better, and
# neither are more than these for one tree.
CANDIDATES_PER_NODE = 2
ENOUGH_CANDIDATES = 64


class ConfigError(ValueError):
    """The user's configuration cannot work. Lists every problem, not the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SuffixConfig:
    """Options of the ``suffix`` proposer: text seen so far, in every request."""

    type: ClassVar[str] = "suffix"

    depth: int = 64
    """Longest drafted path in tokens."""

    max_cached_tokens: int = 1_000_000
    """Tokens of prompts and outputs remembered; the oldest are forgotten first."""

    min_log_prob: float = -9.0
    """Drop drafts whose path log-probability falls below this, in nats."""

    def problems(self) -> Iterator[str]:
        yield from _out_of_range("depth", self.depth, 1, MAX_NODES)
        yield from _out_of_range(
            "max_cached_tokens", self.max_cached_tokens, 1024, 2**30
        )
        if self.min_log_prob > 0:
            yield f"min_log_prob={self.min_log_prob}: must be <= 0, it is a log"


@dataclass(frozen=True, kw_only=True, slots=True)
class NgramConfig:
    """Options of the ``ngram`` proposer: matches inside the request, no global state."""

    type: ClassVar[str] = "ngram"

    depth: int = 64
    """Longest drafted path in tokens."""

    min_n: int = 1
    """Shortest run of tokens that counts as a match."""

    max_n: int = 8
    """Longest run of tokens looked for."""

    def problems(self) -> Iterator[str]:
        yield from _out_of_range("depth", self.depth, 1, MAX_NODES)
        yield from _out_of_range("min_n", self.min_n, 1, 64)
        yield from _out_of_range("max_n", self.max_n, 1, 64)
        if self.min_n > self.max_n:
            yield f"min_n={self.min_n}: must be <= max_n={self.max_n}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecycleConfig:
    """Options of the ``recycle`` proposer: what the target found likely after each
    token, in a table on the device."""

    type: ClassVar[str] = "recycle"

    k: int = 16
    """Successors remembered of each token; 8 bytes of device memory each."""

    depth: int = 8
    """Longest drafted path in tokens."""

    def problems(self) -> Iterator[str]:
        yield from _out_of_range("k", self.k, 1, 256)
        yield from _out_of_range("depth", self.depth, 1, 64)


DRAWN = ("without_replacement", "traversal")
VERIFY = ("auto", "target_only", *DRAWN)
DEFAULT_RULE = "traversal"
DRAW = ("auto", "without_replacement", "mixed")
# Below, the likeliest children are accepted as often as drawn ones, or more often: see
# benchmarks/results/verification_rules.md.
DEFAULT_DRAWN_FROM = 0.7
SHAPES = ("best_first", "static", "sequoia")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceConfig:
    """Options of every proposer that grows its trees with a model, level by level."""

    depth: int = 6
    """Longest drafted path in tokens, one forward of the draft each."""

    width: int = 8
    """Nodes per level that the draft runs on (``best_first``)."""

    top_k: int = 8
    """Children drawn for each of them (``best_first``)."""

    shape: str = "best_first"
    """``best_first``: the likeliest paths; ``static``: the same tree every step, see
    ``branching``; ``sequoia``: the best such tree for ``acceptance``."""

    branching: tuple[int, ...] = ()
    """Children per node, level by level (``static``)."""

    acceptance: tuple[float, ...] = ()
    """How often the draft's k-th choice is the target's (``sequoia``); a list, or the
    file that ``vllm-treespec tune sequoia`` wrote."""

    def problems(self) -> Iterator[str]:
        yield from _out_of_range("depth", self.depth, 1, 64)
        yield from _out_of_range("width", self.width, 1, 256)
        yield from _out_of_range("top_k", self.top_k, 1, 256)
        if self.shape not in SHAPES:
            yield f"shape={self.shape!r}: must be one of {list(SHAPES)}"
        for name, shape in (("branching", "static"), ("acceptance", "sequoia")):
            if self.shape == shape and not getattr(self, name):
                yield f"{name} is missing: shape={shape!r} needs it"
            if self.shape != shape and getattr(self, name):
                yield f"{name}: belongs to shape={shape!r}, shape is {self.shape!r}"
        for level, count in enumerate(self.branching):
            yield from _out_of_range(f"branching[{level}]", count, 1, 256)
        for rank, rate in enumerate(self.acceptance):
            is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
            if not is_number or not 0 <= rate <= 1:
                yield f"acceptance[{rank}]={rate!r}: must be in [0, 1]"

    @property
    def num_static_nodes(self) -> int:
        """Nodes of the tree that ``branching`` spells out, root excluded."""
        levels = range(1, len(self.branching) + 1)
        return sum(prod(self.branching[:level]) for level in levels)


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftModelConfig(DeviceConfig):
    """Options of a ``draft_model`` proposer: a small model with the target's tokens."""

    type: ClassVar[str] = "draft_model"

    model: str = ""
    """Checkpoint directory or name, anything that vLLM loads as a decoder."""

    revision: str | None = None
    """Branch, tag or commit of the draft's repository."""

    quantization: str | None = None
    """As vLLM's ``--quantization``; None reads it from the checkpoint."""

    dtype: str = "auto"
    """As vLLM's ``--dtype``; ``auto`` is the target's."""

    max_model_len: int | None = None
    """Positions the draft is used for; past them it falls silent. None: all that it
    was trained for."""

    def problems(self) -> Iterator[str]:
        if not self.model:
            yield "model is missing: name a checkpoint with the target's vocabulary"
        yield from super(DraftModelConfig, self).problems()
        if self.max_model_len is not None:
            yield from _out_of_range("max_model_len", self.max_model_len, 1, 2**31 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipSet:
    """Sub-layers of the target that a draft leaves out, by the index of their layer."""

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    """Feed-forward layers, mixtures of experts included."""

    model: str | None = None
    """Name of the model that the set was tuned for; the others say which one that is."""
    num_layers: int | None = None
    fingerprint: str | None = None

    def problems(self) -> Iterator[str]:
        for name in ("attention", "mlp"):
            layers = getattr(self, name)
            for layer in layers:
                yield from _out_of_range(f"{name}: layer", layer, 0, 2**16)
            if len(set(layers)) < len(layers):
                yield f"{name}={list(layers)}: names a layer twice"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSkipConfig(DeviceConfig):
    """Options of the ``layer_skip`` proposer: the target itself, with layers skipped."""

    type: ClassVar[str] = "layer_skip"

    skip: SkipSet | None = None
    """``{"attention": [...], "mlp": [...]}``, or the file that ``vllm-treespec tune
    layer-skip`` wrote; None: every other layer but the first and the last two."""

    early_stop: bool = True
    """Grow no deeper once the draft is not sure enough; waits for the device at each
    level."""

    def problems(self) -> Iterator[str]:
        yield from super(LayerSkipConfig, self).problems()
        if self.skip is not None:
            for problem in self.skip.problems():
                yield f"skip.{problem}"
        if not isinstance(self.early_stop, bool):
            yield f"early_stop={self.early_stop!r}: must be true or false"


HostedConfig = SuffixConfig | NgramConfig
ProposerConfig = HostedConfig | RecycleConfig | DraftModelConfig | LayerSkipConfig
PROPOSERS: dict[str, type[ProposerConfig]] = {
    config.type: config
    for config in (
        SuffixConfig,
        NgramConfig,
        RecycleConfig,
        DraftModelConfig,
        LayerSkipConfig,
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOptions:
    """What a request may ask for, and what those that do not ask get."""

    max_nodes: int | None = None
    """Draft nodes verified per step, root excluded; 0: no speculation; None:
    ``num_speculative_tokens``."""

    proposers: tuple[str, ...] | None = None
    """Names of those that may draft; None: all of them."""

    def problems(
        self, prefix: str, max_nodes: int, proposers: Sequence[str]
    ) -> Iterator[str]:
        """What is wrong with them on a server of this size and these proposers."""
        if self.max_nodes is not None:
            yield from _out_of_range(f"{prefix}max_nodes", self.max_nodes, 0, max_nodes)
        for name in self.proposers or ():
            if name not in proposers:
                yield f"{prefix}proposers: {name!r} is none of {list(proposers)}" + (
                    _hint(str(name), proposers)
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeSpecConfig:
    """What ``--speculative-config '{"method": "treespec", ...}'`` says."""

    num_speculative_tokens: int = 31
    """Draft nodes verified per request and step, root excluded. With the root, 31 make
    32 rows, and those of four heads the 128 that a tile of tree attention holds."""

    proposers: tuple[ProposerConfig, ...] = field(default=(SuffixConfig(),))
    """Where drafts come from; their trees are merged. Several draft models may be."""

    verify: str = "auto"
    """How drafts of sampled requests are verified. ``target_only``: likeliest
    children, the target's own pick is followed; ``without_replacement``, ``traversal``:
    children drawn from the first proposer that runs a model, by the rejection rule of
    that name; ``auto``: ``traversal`` where there is one, else ``target_only``."""

    draw: str = "auto"
    """Which children of sampled requests are drawn. ``without_replacement``: all of
    them; ``mixed``: one per node, beside its likeliest; ``auto``: all from a temperature
    of 0.7 on, none below."""

    draft_logits_gib: float = 1.0
    """Device memory for what children were drawn from; sampled requests for which it
    does not suffice are verified as by ``target_only``."""

    adaptive: bool = True
    """Draft less often with a proposer that does not pay for its time."""

    max_rows: int | None = None
    """Rows of one forward pass, roots included, that all requests' trees share: the
    more requests, the smaller the trees. None: 256 or one whole tree, whichever is
    more."""

    draft_timeout_ms: int = 1000
    """A proposer on the host that takes longer for one step's drafts is not asked
    again."""

    request_defaults: RequestOptions = RequestOptions()
    """What requests get that do not ask for something else themselves."""

    kernels: str = "auto"
    """``triton``, ``torch`` (their slow twins), or ``auto``: Triton on a GPU."""

    def __post_init__(self) -> None:
        # First those that can draw: what is drawn keeps its order when trees are merged.
        recycled = tuple(
            each for each in self.proposers if isinstance(each, RecycleConfig)
        )
        ordered = self.device_proposers + recycled + self.hosted_proposers
        object.__setattr__(self, "proposers", ordered)
        if problems := list(self._problems()):
            raise ConfigError("invalid treespec config:\n  " + "\n  ".join(problems))

    def _problems(self) -> Iterator[str]:
        yield from _out_of_range(
            "num_speculative_tokens", self.num_speculative_tokens, 1, MAX_NODES
        )
        if not self.proposers:
            yield f"tree.proposers=[]: name at least one of {sorted(PROPOSERS)}"
        types = [
            each.type
            for each in self.proposers
            if not isinstance(each, DraftModelConfig)
        ]
        for name in sorted({name for name in types if types.count(name) > 1}):
            yield f"tree.proposers: {name!r} is listed twice, list it once"
        if len(self.proposers) > MAX_PROPOSERS:
            yield f"tree.proposers: {len(self.proposers)}, at most {MAX_PROPOSERS}"
        for position, proposer in enumerate(self.proposers):
            for problem in proposer.problems():
                yield f"tree.proposers[{position}].{problem}"
        for draft in self.device_proposers:
            if draft.num_static_nodes > self.num_speculative_tokens:
                yield (
                    f"branching={list(draft.branching)} makes "
                    f"{draft.num_static_nodes} nodes: at most num_speculative_tokens="
                    f"{self.num_speculative_tokens}"
                )
        if self.verify not in VERIFY:
            yield f"tree.verify={self.verify!r}: must be one of {list(VERIFY)}"
        elif self.verify in DRAWN and not self.device_proposers:
            yield (
                f"tree.verify={self.verify!r}: only draft_model and layer_skip can draw "
                "children"
            )
        if self.draw not in DRAW:
            yield f"tree.draw={self.draw!r}: must be one of {list(DRAW)}"
        gib = self.draft_logits_gib
        if isinstance(gib, bool) or not isinstance(gib, int | float) or gib < 0:
            yield f"tree.draft_logits_gib={gib!r}: must be a number >= 0"
        if not isinstance(self.adaptive, bool):
            yield f"tree.adaptive={self.adaptive!r}: must be true or false"
        if self.max_rows is not None:
            yield from _out_of_range(
                "tree.max_rows", self.max_rows, self.num_speculative_tokens + 1, 2**20
            )
        yield from _out_of_range(
            "tree.draft_timeout_ms", self.draft_timeout_ms, 1, 3_600_000
        )
        yield from self.request_defaults.problems(
            "tree.request_defaults.", self.num_speculative_tokens, self.proposer_names
        )
        if self.kernels not in KERNELS:
            yield f"tree.kernels={self.kernels!r}: must be one of {list(KERNELS)}"

    @property
    def num_shared_rows(self) -> int:
        """``max_rows``, with its default."""
        if self.max_rows is not None:
            return self.max_rows
        return max(DEFAULT_ROWS, self.num_speculative_tokens + 1)

    @property
    def device_proposers(self) -> tuple[DraftModelConfig | LayerSkipConfig, ...]:
        """The proposers that run a model, in order."""
        return tuple(
            each
            for each in self.proposers
            if isinstance(each, DraftModelConfig | LayerSkipConfig)
        )

    @property
    def hosted_proposers(self) -> tuple[HostedConfig, ...]:
        """The proposers that draft on the host, in order."""
        return tuple(each for each in self.proposers if isinstance(each, HostedConfig))

    @property
    def rule(self) -> str:
        """The verification rule of sampled requests."""
        if self.verify == "auto":
            return DEFAULT_RULE if self.device_proposers else "target_only"
        return self.verify

    def draws_at(self, temperature: float) -> bool:
        """Whether a request of this temperature has children drawn."""
        least = DEFAULT_DRAWN_FROM if self.draw == "auto" else 0.0
        return self.rule != "target_only" and temperature > 0 and temperature >= least

    @property
    def max_candidates(self) -> int:
        """Of one proposer, each step."""
        return max_candidates(len(self.proposers), self.num_speculative_tokens)

    @property
    def num_drawn(self) -> int:
        """Nodes of a tree that are drawn from a draft model, if any are. Other
        proposers' candidates share the tree with them."""
        if self.rule == "target_only":
            return 0
        alone = len(self.proposers) == 1
        return self.num_speculative_tokens // (1 if alone else 2) or 1

    @property
    def proposer_names(self) -> list[str]:
        """Distinct names in order: types, draft models after the first numbered."""
        types = [proposer.type for proposer in self.proposers]
        return [
            name if (count := types[:place].count(name)) == 0 else f"{name}_{count + 1}"
            for place, name in enumerate(types)
        ]

    @property
    def max_depth(self) -> int:
        """Longest path of a tree, in tokens."""
        depths = [
            len(each.branching)
            if isinstance(each, DeviceConfig) and each.branching
            else each.depth
            for each in self.proposers
        ]
        return min(self.num_speculative_tokens, max(depths))

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> TreeSpecConfig:
        """Read the whole ``speculative_config`` object.

        Raises:
            ConfigError: naming every value, bound and fix.
        """
        raw = {key.replace("-", "_"): value for key, value in raw.items()}
        _refuse_unknown(
            "speculative_config", raw, ("method", "num_speculative_tokens", "tree")
        )
        tree = raw.get("tree", {})
        _require("tree", tree, Mapping, "an object")
        settings = (
            *("kernels", "adaptive", "verify", "draw", "draft_logits_gib"),
            *("max_rows", "draft_timeout_ms"),
        )
        _refuse_unknown("tree", tree, ("proposers", "request_defaults", *settings))
        options: dict[str, Any] = {
            key: raw[key] for key in ("num_speculative_tokens",) if key in raw
        }
        options |= {key: tree[key] for key in settings if key in tree}
        if "proposers" in tree:
            _require("tree.proposers", tree["proposers"], list, "a list")
            options["proposers"] = tuple(
                _parse_proposer(f"tree.proposers[{position}]", proposer)
                for position, proposer in enumerate(tree["proposers"])
            )
        if "request_defaults" in tree:
            where = "tree.request_defaults"
            _require(where, tree["request_defaults"], Mapping, "an object")
            options["request_defaults"] = _parse_request(
                where, tree["request_defaults"]
            )
        return cls(**options)

    def for_request(self, extra_args: Mapping[str, Any] | None) -> RequestOptions:
        """What a request gets, with nothing left open.

        Args:
            extra_args: the request's, ours begin with ``treespec_``.

        Raises:
            ConfigError: naming every value, bound and fix.
        """
        asked = {
            key: value
            for key, value in (extra_args or {}).items()
            if key.startswith(REQUEST_PREFIX)
        }
        options = _parse_request("extra_args", asked, REQUEST_PREFIX)
        problems = options.problems(
            REQUEST_PREFIX, self.num_speculative_tokens, self.proposer_names
        )
        if found := list(problems):
            raise ConfigError("; ".join(found))
        defaults = self.request_defaults
        return RequestOptions(
            max_nodes=_first_given(
                options.max_nodes, defaults.max_nodes, self.num_speculative_tokens
            ),
            proposers=_first_given(
                options.proposers, defaults.proposers, tuple(self.proposer_names)
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON that ``parse`` reads back; every option is spelled out."""
        return {
            "method": METHOD,
            "num_speculative_tokens": self.num_speculative_tokens,
            "tree": {
                "proposers": [
                    {"type": proposer.type, **asdict(proposer)}
                    for proposer in self.proposers
                ],
                "kernels": self.kernels,
                "adaptive": self.adaptive,
                "verify": self.verify,
                "draw": self.draw,
                "draft_logits_gib": self.draft_logits_gib,
                "max_rows": self.max_rows,
                "draft_timeout_ms": self.draft_timeout_ms,
                "request_defaults": {
                    name: value
                    for name, value in asdict(self.request_defaults).items()
                    if value is not None
                },
            },
        }


KERNELS = ("auto", "triton", "torch")
# Where a forward pass in half precision begins to be limited by arithmetic instead of
# by reading weights: peak FLOP/s over bytes/s is 153 on an A100, 206 on an H200 and 295
# on an H100 (NVIDIA's data sheets, dense).
DEFAULT_ROWS = 256
REQUEST_PREFIX = "treespec_"  # of our names among a request's ``extra_args``


def max_candidates(num_proposers: int, num_nodes: int) -> int:
    """Of one proposer, for trees of ``num_nodes``.

    Several proposers offer more than the tree has room for: where they meet, one tells
    what another's nodes are worth.
    """
    if num_proposers == 1:
        return num_nodes
    return max(num_nodes, min(num_nodes * CANDIDATES_PER_NODE, ENOUGH_CANDIDATES))


def _parse_request(
    where: str, raw: Mapping[str, Any], prefix: str = ""
) -> RequestOptions:
    known = {f"{prefix}{each.name}": each.name for each in fields(RequestOptions)}
    _refuse_unknown(where, raw, tuple(known))
    options = {known[key]: value for key, value in raw.items()}
    if "proposers" in options:
        names = options["proposers"]
        if isinstance(names, str):
            names = [names]
        _require(f"{where}: {prefix}proposers", names, list | tuple, "a list of names")
        options["proposers"] = tuple(names)
    return RequestOptions(**options)


def _parse_proposer(where: str, raw: Any) -> ProposerConfig:
    _require(where, raw, Mapping, 'an object such as {"type": "suffix"}')
    name = raw.get("type")
    if name not in PROPOSERS:
        raise ConfigError(
            f"{where}.type={name!r}: must be one of {sorted(PROPOSERS)}"
            + _hint(str(name), PROPOSERS)
        )
    config = PROPOSERS[name]
    _refuse_unknown(where, raw, ("type", *(option.name for option in fields(config))))
    options = {key: value for key, value in raw.items() if key != "type"}
    if isinstance(options.get("acceptance"), str):
        path = options["acceptance"]
        (options["acceptance"],) = _read_tuned(
            where, "acceptance", path, "sequoia", ("acceptance",)
        ).values()
    if options.get("skip") is not None:
        options["skip"] = _parse_skip(where, options["skip"])
    for name in ("branching", "acceptance"):
        if name in options:
            _require(f"{where}.{name}", options[name], list | tuple, "a list")
            options[name] = tuple(options[name])
    return config(**options)


def _parse_skip(where: str, raw: Any) -> SkipSet:
    if isinstance(raw, str):
        names = tuple(each.name for each in fields(SkipSet))
        raw = _read_tuned(where, "skip", raw, "layer-skip", names)
    where = f"{where}.skip"
    _require(where, raw, Mapping, 'a file, or {"attention": [...], "mlp": [...]}')
    _refuse_unknown(where, raw, tuple(each.name for each in fields(SkipSet)))
    options = dict(raw)
    for name in ("attention", "mlp"):
        layers = options.get(name, ())
        _require(f"{where}.{name}", layers, list | tuple, "a list of layers")
        options[name] = tuple(layers)
    return SkipSet(**options)


def _read_tuned(
    where: str, option: str, path: str, what: str, names: tuple[str, ...]
) -> dict[str, Any]:
    """These values of a file that ``vllm-treespec tune`` wrote."""
    try:
        with open(path) as file:
            content = json.load(file)
        return {name: content[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where}.{option}={path!r}: {type(error).__name__}: {error}; "
            f"'vllm-treespec tune {what}' writes such a file"
        ) from error


def _refuse_unknown(where: str, raw: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in raw:
        if key not in known:
            raise ConfigError(
                f"unknown option {key!r} in {where}"
                + (_hint(key, known) or f"; known: {sorted(known)}")
            )


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _first_given(*values: T | None) -> T:
    return next(value for value in values if value is not None)


def _require(where: str, value: Any, kind: Any, wanted: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{where}={value!r}: must be {wanted}")


def _out_of_range(name: str, value: Any, low: int, high: int) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, int):
        yield f"{name}={value!r}: must be an integer"
    elif not low <= value <= high:
        yield f"{name}={value}: must be in [{low}, {high}]"
