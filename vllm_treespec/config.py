"""User-facing configuration: one declaration per option, with its bounds, its help and
its default. Parsed once, then immutable.

What can be said of one option stands in its type; what ties it to another is checked
where the later of the two is declared, so that all problems are found at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, core_schema

from vllm_treespec.config_errors import ConfigError as ConfigError
from vllm_treespec.config_errors import (
    at,
    error,
    lines,
    one_of,
    raise_all,
    same_name,
    shown,
    unknown,
)
from vllm_treespec.strict_json import read_object

T = TypeVar("T")

METHOD = "treespec"
MAX_NODES = 1024
MAX_PROPOSERS = 31  # one bit each
# Of one proposer for each node of a tree that several share. Four are no better, and
# neither are more than these for one tree.
CANDIDATES_PER_NODE = 2
ENOUGH_CANDIDATES = 64
# Where a forward pass in half precision begins to be limited by arithmetic instead of
# by reading weights: peak FLOP/s over bytes/s is 153 on an A100, 206 on an H200 and 295
# on an H100 (NVIDIA's data sheets, dense).
DEFAULT_ROWS = 256
REQUEST_PREFIX = "treespec_"  # of our names among a request's ``extra_args``
DEFAULT_RULE = "traversal"
DRAWN = ("without_replacement", "traversal")
# Below, the likeliest children are accepted as often as drawn ones, or more often: see
# benchmarks/results/verification_rules.md.
DEFAULT_DRAWN_FROM = 0.7


@dataclass(frozen=True, slots=True)
class Within:
    """The bounds of a number, both allowed."""

    low: float
    high: float

    def check(self, value: Any) -> Any:
        if not self.low <= value <= self.high:
            raise error(f"must be in [{self.low}, {self.high}]")
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "minimum": self.low, "maximum": self.high}


class Options(BaseModel):
    """Base of everything that users write: strict types, and no name that is not ours.

    The text below an option is its help, in the JSON schema and in the tables of the
    documentation.
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def problems(cls, raw: Mapping[str, Any]) -> list[str]:
        """What keeps these options from being ones of this kind."""
        try:
            cls.model_validate(raw)
        except ValidationError as found:
            return lines(found.errors(), raw, "", {"": tuple(cls.model_fields)})
        return []

    @model_validator(mode="before")
    @classmethod
    def _accept_dashes(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        # A name that is there twice stays as it is, and is refused as unknown.
        return {
            key if same_name(key) in raw else same_name(key): value
            for key, value in raw.items()
        }


def _flag(value: Any) -> Any:
    """vLLM's API server makes numbers of the booleans among a request's arguments."""
    return bool(value) if type(value) in (int, float) and value in (0, 1) else value


def _names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _tuned(what: str, *names: str) -> Any:
    """Reads the file that ``vllm-treespec tune`` wrote, if one is named; of an object,
    these values, of a list the one."""

    advice = f"'vllm-treespec tune {what}' writes such a file"

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            if not Path(value).is_file():
                raise ConfigError("there is no such file")
            content = read_object(Path(value).read_text("utf-8"), "its content")
            found = {name: content[name] for name in names}
        except KeyError as missing:
            raise error(f"the file has no {missing}; {advice}") from missing
        except (OSError, ValueError) as problem:
            raise error(f"{problem}; {advice}") from problem
        return found if len(names) > 1 else found[names[0]]

    return read


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise error("must be a string")
    return value


Text = BeforeValidator(_text)
List = Field(strict=False)  # JSON has lists where we keep tuples
HostDepth = Annotated[int, Within(1, MAX_NODES)]
ModelDepth = Annotated[int, Within(1, 64)]
UpTo256 = Annotated[int, Within(1, 256)]
Layer = Annotated[int, Within(0, 2**16)]
Rate = Annotated[float, Within(0, 1)]


class SuffixConfig(Options):
    """Options of the ``suffix`` proposer: text seen so far, in every request."""

    type: Literal["suffix"] = "suffix"

    depth: HostDepth = 64
    """Longest drafted path in tokens."""

    max_cached_tokens: Annotated[int, Within(1024, 2**30)] = 1_000_000
    """Tokens of prompts and outputs remembered, 192 bytes of host memory each; the
    oldest are forgotten first."""

    min_log_prob: Annotated[float, Within(-1000, 0)] = -9.0
    """Drop drafts whose path log-probability falls below this, in nats."""


class NgramConfig(Options):
    """Options of the ``ngram`` proposer: matches inside the request, no global state."""

    type: Literal["ngram"] = "ngram"

    depth: HostDepth = 64
    """Longest drafted path in tokens."""

    min_n: ModelDepth = 1
    """Shortest run of tokens that counts as a match."""

    max_n: ModelDepth = 8
    """Longest run of tokens looked for."""

    @field_validator("max_n")
    @classmethod
    def _not_below_min_n(cls, max_n: int, info: ValidationInfo) -> int:
        if max_n < (min_n := info.data.get("min_n", 1)):
            raise error(f"must be >= min_n={min_n}")
        return max_n


class RecycleConfig(Options):
    """Options of the ``recycle`` proposer: what the target found likely after each
    token, in a table on the device."""

    type: Literal["recycle"] = "recycle"

    k: UpTo256 = 16
    """Successors remembered of each token and pair of tokens; 8 bytes of device memory
    each."""

    depth: ModelDepth = 8
    """Longest drafted path in tokens."""


class DeviceConfig(Options):
    """Options of every proposer that grows its trees with a model, level by level."""

    depth: ModelDepth = 6
    """Longest drafted path in tokens: levels of the tree, one forward of the draft
    each."""

    width: UpTo256 = 8
    """Nodes per level that the draft runs on (``best_first``), the likeliest paths."""

    top_k: UpTo256 = 8
    """Children drawn for each of them (``best_first``)."""

    shape: Annotated[Literal["best_first", "static", "sequoia"], Text] = "best_first"
    """``best_first``: the likeliest paths; ``static``: the same tree every step, see
    ``branching``; ``sequoia``: the best such tree for ``acceptance``."""

    branching: Annotated[tuple[UpTo256, ...], List] = ()
    """Children per node, level by level (``static``), such as ``[4, 2, 2, 1]``."""

    acceptance: Annotated[
        tuple[Rate, ...],
        List,
        BeforeValidator(
            _tuned("sequoia", "acceptance"),
            json_schema_input_type=str | tuple[Rate, ...],
        ),
    ] = ()
    """How often the draft's k-th choice is the target's (``sequoia``); a list, or the
    file that ``vllm-treespec tune sequoia`` wrote."""

    @field_validator("branching", "acceptance")
    @classmethod
    def _belongs_to_the_shape(cls, value: Any, info: ValidationInfo) -> Any:
        needed = {"branching": "static", "acceptance": "sequoia"}[info.field_name or ""]
        shape = info.data.get("shape", needed if value else None)
        if shape == needed and not value:
            raise error(f"shape={needed!r} needs it", kind="missing")
        if shape != needed and value:
            raise error(f"belongs to shape={needed!r}, shape is {shape!r}")
        return value

    @property
    def num_static_nodes(self) -> int:
        """Nodes of the tree that ``branching`` spells out, root excluded."""
        levels = range(1, len(self.branching) + 1)
        return sum(prod(self.branching[:level]) for level in levels)


class DraftModelConfig(DeviceConfig):
    """Options of a ``draft_model`` proposer: a small model with the target's tokens."""

    type: Literal["draft_model"] = "draft_model"

    model: Annotated[str, Field(min_length=1)]
    """Checkpoint directory or name, anything that vLLM loads as a decoder."""

    revision: str | None = None
    """Branch, tag or commit of the draft's repository."""

    quantization: str | None = None
    """As vLLM's ``--quantization``; ``null`` reads it from the checkpoint."""

    dtype: str = "auto"
    """As vLLM's ``--dtype``; ``auto`` is the target's."""

    max_model_len: Annotated[int, Within(1, 2**31 - 1)] | None = None
    """Positions the draft is used for; past them it falls silent. ``null``: all that it
    was trained for."""


class SkipSet(Options):
    """Sub-layers of the target that a draft leaves out, by the index of their layer."""

    attention: Annotated[tuple[Layer, ...], List] = ()
    """Attention layers."""

    mlp: Annotated[tuple[Layer, ...], List] = ()
    """Feed-forward layers, mixtures of experts included."""

    model: str | None = None
    """Name of the model that the set was tuned for; the others say which one that is."""

    num_layers: Annotated[int, Within(1, 2**16)] | None = None
    """Layers of that model."""

    fingerprint: str | None = None
    """Of that model's configuration."""

    @field_validator("attention", "mlp")
    @classmethod
    def _names_each_once(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) < len(layers):
            raise error("names a layer twice")
        return layers


def _skip_set(value: Any) -> Any:
    value = _tuned("layer-skip", *SkipSet.model_fields)(value)
    if not isinstance(value, Mapping | SkipSet | None):
        raise error('must be a file, or {"attention": [...], "mlp": [...]}')
    return value


class LayerSkipConfig(DeviceConfig):
    """Options of the ``layer_skip`` proposer: the target itself, with layers skipped."""

    type: Literal["layer_skip"] = "layer_skip"

    skip: Annotated[
        SkipSet | None,
        BeforeValidator(_skip_set, json_schema_input_type=str | SkipSet | None),
    ] = None
    """``{"attention": [...], "mlp": [...]}``, or the file that ``vllm-treespec tune
    layer-skip`` wrote; ``null``: every other layer but the first and the last two."""

    early_stop: bool = False
    """Grow no deeper once the draft is not sure enough; waits for the device at each
    level."""


HostedConfig = SuffixConfig | NgramConfig
ModelProposerConfig = DraftModelConfig | LayerSkipConfig
ProposerConfig = HostedConfig | RecycleConfig | ModelProposerConfig
PROPOSERS: dict[str, type[ProposerConfig]] = {
    each.model_fields["type"].default: each for each in get_args(ProposerConfig)
}


def _named(raw: Any) -> Any:
    """Nothing but a string reaches pydantic, which cannot print all that Python can."""
    if isinstance(raw, Mapping) and not isinstance(kind := raw.get("type", ""), str):
        raise_all([at(["type"], kind, one_of("", PROPOSERS))])
    return raw


AnyProposer = Annotated[
    Annotated[ProposerConfig, Field(discriminator="type")], BeforeValidator(_named)
]


class RequestOptions(Options):
    """What a request may ask for, and what those that do not ask get."""

    max_nodes: int | None = Field(default=None, json_schema_extra={"minimum": 0})
    """Draft nodes verified per step, root excluded; 0: no speculation; ``null``:
    ``num_speculative_tokens``."""

    proposers: Annotated[
        tuple[str, ...] | None,
        List,
        BeforeValidator(_names, json_schema_input_type=str | tuple[str, ...] | None),
    ] = None
    """Names of those that may draft; ``null``: all of them."""

    remember: Annotated[bool | None, BeforeValidator(_flag)] = None
    """Whether its text may be a draft for later requests; ``null``: yes."""

    def beyond(
        self, max_nodes: int, proposers: Sequence[str]
    ) -> list[InitErrorDetails]:
        """What a server of this size and these proposers does not have."""
        problems = []
        asked = self.max_nodes
        if asked is not None and not 0 <= asked <= max_nodes:
            text = f"must be in [0, {max_nodes}]"
            problems.append(at(["max_nodes"], asked, text))
        for place, name in enumerate(self.proposers or ()):
            if name not in proposers:
                text = one_of(name, proposers)
                problems.append(at(["proposers", place], name, text))
        return problems


class TreeSpecConfig(Options):
    """What ``--speculative-config '{"method": "treespec", ...}'`` says.

    Users write all but the first option inside ``tree``.
    """

    num_speculative_tokens: Annotated[int, Within(1, MAX_NODES)] = 31
    """Draft nodes verified per request and step, root excluded. With the root, 31 make
    32 rows, and those of four heads the 128 that a tile of tree attention holds. On a
    CPU, where rows cost, the default is 15 in half precision with AMX, else 7."""

    proposers: Annotated[tuple[AnyProposer, ...], List] = Field(
        default=(SuffixConfig(),), json_schema_extra={"default": [{"type": "suffix"}]}
    )
    """Where drafts come from; their trees are merged. Several draft models may be."""

    verify: Annotated[
        Literal["auto", "target_only", "without_replacement", "traversal"], Text
    ] = "auto"
    """How drafts of sampled requests are verified. ``target_only``: likeliest
    children, the target's own pick is followed; ``without_replacement``, ``traversal``:
    children drawn from the first proposer that runs a model, by the rejection rule of
    that name; ``auto``: ``traversal`` where there is one, else ``target_only``."""

    draw: Annotated[Literal["auto", "without_replacement", "mixed"], Text] = "auto"
    """Which children of sampled requests are drawn. ``without_replacement``: all of
    them; ``mixed``: one per node, beside its likeliest; ``auto``: all from a temperature
    of 0.7 on, none below."""

    draft_logits_gib: Annotated[float, Within(0, 1024)] = 1.0
    """Device memory for what children were drawn from; sampled requests for which it
    does not suffice are verified as by ``target_only``."""

    adaptive: bool = True
    """Draft less often with a proposer that does not pay for its time."""

    max_rows: int | None = Field(default=None, json_schema_extra={"maximum": 2**20})
    """Rows of one forward pass, roots included, that all requests' trees share: the
    more requests, the smaller the trees. ``null``: 256 or one whole tree, whichever is
    more; on a CPU 64 in half precision with AMX, else 16."""

    min_probability: Annotated[float, Within(0, 1)] | None = None
    """Nodes that are less likely than this to be accepted are not verified. On a CPU
    only, where every row costs. ``null``: 0.02 in half precision with AMX, else 0.1."""

    draft_timeout_ms: Annotated[int, Within(1, 3_600_000)] = 1000
    """A proposer on the host that takes longer for one step's drafts is not asked
    again."""

    request_defaults: RequestOptions = Field(
        default=RequestOptions(), json_schema_extra={"default": {}}
    )
    """What requests get that do not ask for something else themselves: ``max_nodes``,
    ``proposers`` and ``remember``."""

    kernels: Annotated[Literal["auto", "triton", "torch"], Text] = "auto"
    """``triton``, ``torch`` (their slow twins, for debugging), or ``auto``: Triton
    where it compiles, and torch's own attention on a CPU."""

    @field_validator("proposers")
    @classmethod
    def _fit_together(
        cls, proposers: tuple[ProposerConfig, ...], info: ValidationInfo
    ) -> tuple[ProposerConfig, ...]:
        if not proposers:
            raise error(f"name at least one of {sorted(PROPOSERS)}")
        if len(proposers) > MAX_PROPOSERS:
            raise error(f"are {len(proposers)}, at most {MAX_PROPOSERS}")
        problems = []
        types = [each.type for each in proposers]
        nodes = info.data.get("num_speculative_tokens", MAX_NODES)
        for place, each in enumerate(proposers):
            if each.type != "draft_model" and each.type in types[:place]:
                text = "is listed twice, list it once"
                problems.append(at([place, each.type, "type"], each.type, text))
            if isinstance(each, ModelProposerConfig) and each.num_static_nodes > nodes:
                text = (
                    f"makes {each.num_static_nodes} nodes: at most "
                    f"num_speculative_tokens={nodes}"
                )
                path = [place, each.type, "branching"]
                problems.append(at(path, list(each.branching), text))
        raise_all(problems)
        return _in_order(proposers)

    @field_validator("verify")
    @classmethod
    def _somebody_draws(cls, verify: str, info: ValidationInfo) -> str:
        proposers = info.data.get("proposers")
        if proposers and verify in DRAWN and not _running_models(proposers):
            raise error("only draft_model and layer_skip can draw children")
        return verify

    @field_validator("draft_logits_gib")
    @classmethod
    def _room_for_what_is_drawn(cls, gib: float, info: ValidationInfo) -> float:
        verify = info.data.get("verify")
        if verify in DRAWN and gib == 0:
            raise error(f"must be more than 0: verify={verify!r} draws children")
        return gib

    @field_validator("max_rows")
    @classmethod
    def _room_for_a_tree(cls, max_rows: int | None, info: ValidationInfo) -> int | None:
        if max_rows is not None:
            Within(info.data.get("num_speculative_tokens", 0) + 1, 2**20).check(
                max_rows
            )
        return max_rows

    @field_validator("request_defaults")
    @classmethod
    def _within_the_server(
        cls, defaults: RequestOptions, info: ValidationInfo
    ) -> RequestOptions:
        nodes = info.data.get("num_speculative_tokens", MAX_NODES)
        if "proposers" in info.data:
            raise_all(defaults.beyond(nodes, _distinct_names(info.data["proposers"])))
        return defaults

    @property
    def num_shared_rows(self) -> int:
        """``max_rows``, with its default."""
        if self.max_rows is not None:
            return self.max_rows
        return max(DEFAULT_ROWS, self.num_speculative_tokens + 1)

    @property
    def device_proposers(self) -> tuple[ModelProposerConfig, ...]:
        """The proposers that run a model, in order."""
        return _running_models(self.proposers)

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
        return _distinct_names(self.proposers)

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
        options, problems = _flattened(raw)
        try:
            parsed = cls.model_validate(options)
        except ValidationError as found:
            errors = [
                {**each, "loc": (*_WHERE.get(each["loc"][0], ("tree",)), *each["loc"])}
                for each in found.errors(include_url=False)
            ]
            problems += lines(errors, raw, "speculative_config", KNOWN)
        if problems:
            raise ConfigError("invalid treespec config:\n  " + "\n  ".join(problems))
        return parsed

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
        try:
            options = RequestOptions.model_validate(
                {key.removeprefix(REQUEST_PREFIX): asked[key] for key in asked}
            )
            raise_all(options.beyond(self.num_speculative_tokens, self.proposer_names))
        except ValidationError as found:
            errors = [
                {**each, "loc": (f"{REQUEST_PREFIX}{each['loc'][0]}", *each["loc"][1:])}
                for each in found.errors(include_url=False)
            ]
            known = {"": [f"{REQUEST_PREFIX}{each}" for each in KNOWN_BY_REQUESTS]}
            problems = lines(errors, asked, "extra_args", known)
            raise ConfigError("; ".join(problems)) from None
        defaults = self.request_defaults
        return RequestOptions(
            max_nodes=_first_given(
                options.max_nodes, defaults.max_nodes, self.num_speculative_tokens
            ),
            proposers=_first_given(
                options.proposers, defaults.proposers, tuple(self.proposer_names)
            ),
            remember=_first_given(options.remember, defaults.remember, True),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON that ``parse`` reads back; every option is spelled out."""
        tree = self.model_dump(mode="json")
        nodes = tree.pop("num_speculative_tokens")
        return {"method": METHOD, "num_speculative_tokens": nodes, "tree": tree}

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of what ``parse`` reads."""
        flat = cls.model_json_schema()
        tree = {"type": "object", "additionalProperties": False}
        nodes = flat["properties"].pop("num_speculative_tokens")
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "speculative_config of vllm-treespec",
            "type": "object",
            "additionalProperties": False,
            "required": ["method"],
            "properties": {
                "method": {"const": METHOD},
                "num_speculative_tokens": nodes,
                "tree": {**tree, "properties": flat["properties"]},
            },
            "$defs": flat["$defs"],
        }


OUTER = ("method", "num_speculative_tokens", "tree")
KNOWN_BY_REQUESTS = tuple(RequestOptions.model_fields)
# The names that an object may have, by its type or its own name.
KNOWN = {
    "type": tuple(PROPOSERS),
    **{name: tuple(each.model_fields) for name, each in PROPOSERS.items()},
    "skip": tuple(SkipSet.model_fields),
    "request_defaults": KNOWN_BY_REQUESTS,
    "tree": tuple(set(TreeSpecConfig.model_fields) - set(OUTER)),
}
_WHERE: dict[Any, tuple[str, ...]] = {"num_speculative_tokens": ()}


def max_candidates(num_proposers: int, num_nodes: int) -> int:
    """Of one proposer, for trees of ``num_nodes``.

    Several proposers offer more than the tree has room for: where they meet, one tells
    what another's nodes are worth.
    """
    if num_proposers == 1:
        return num_nodes
    return max(num_nodes, min(num_nodes * CANDIDATES_PER_NODE, ENOUGH_CANDIDATES))


def _flattened(raw: Mapping[str, Any]) -> tuple[dict[Any, Any], list[str]]:
    """The options of ``tree`` beside the one that is not in it, and what is wrong with
    the two objects themselves."""
    outer: dict[str, Any] = {}
    problems = []
    for key, value in raw.items():
        name = same_name(key)
        if name not in OUTER or (name != key and name in raw):
            problems.append(_misplaced(key, raw))
        else:
            outer[name] = value
    if (method := outer.pop("method", METHOD)) != METHOD:
        problems.append(f"method={shown(method)}: must be {METHOD!r}")
    tree = outer.pop("tree", {})
    if not isinstance(tree, Mapping):
        problems.append(f"tree={shown(tree)}: must be an object")
        tree = {}
    elif doubled := [key for key in tree if same_name(key) in OUTER]:
        problems += [f"tree.{key}: belongs beside tree, not into it" for key in doubled]
        tree = {key: value for key, value in tree.items() if key not in doubled}
    return {**tree, **outer}, problems


def _misplaced(key: Any, raw: Mapping[str, Any]) -> str:
    if key == "model":
        return _draft_model_form(raw)
    if same_name(key) in KNOWN["tree"]:
        return f'{key}: belongs into "tree": {{{json.dumps(key)}: ...}}'
    return unknown(key, "speculative_config", OUTER)


def _draft_model_form(raw: Mapping[str, Any]) -> str:
    """Everybody's first try, as it works."""
    right = {
        "method": METHOD,
        **{key: raw[key] for key in raw if same_name(key) == OUTER[1]},
        "tree": {"proposers": [{"type": "draft_model", "model": raw["model"]}]},
    }
    return (
        "unknown option 'model' in speculative_config; a draft model is one of the "
        f"proposers: {json.dumps(right, default=shown)}"
    )


def _in_order(proposers: tuple[ProposerConfig, ...]) -> tuple[ProposerConfig, ...]:
    """First those that can draw: what is drawn keeps its order when trees are merged;
    those on the host last."""
    kinds = (ModelProposerConfig, RecycleConfig, HostedConfig)
    return tuple(each for kind in kinds for each in proposers if isinstance(each, kind))


def _running_models(
    proposers: tuple[ProposerConfig, ...],
) -> tuple[ModelProposerConfig, ...]:
    return tuple(each for each in proposers if isinstance(each, ModelProposerConfig))


def _distinct_names(proposers: tuple[ProposerConfig, ...]) -> list[str]:
    types = [proposer.type for proposer in proposers]
    return [
        name if (count := types[:place].count(name)) == 0 else f"{name}_{count + 1}"
        for place, name in enumerate(types)
    ]


def _first_given(*values: T | None) -> T:
    return next(value for value in values if value is not None)
