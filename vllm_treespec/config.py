"""User-facing configuration: parsed once, validated once, then immutable."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

METHOD = "treespec"
MAX_NODES = 1024


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


ProposerConfig = SuffixConfig | NgramConfig
PROPOSERS: dict[str, type[SuffixConfig] | type[NgramConfig]] = {
    config.type: config for config in (SuffixConfig, NgramConfig)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeSpecConfig:
    """What ``--speculative-config '{"method": "treespec", ...}'`` says."""

    num_speculative_tokens: int = 32
    """Draft nodes verified per request and step, root excluded."""

    proposers: tuple[ProposerConfig, ...] = field(default=(SuffixConfig(),))
    """Where drafts come from; their trees are merged."""

    kernels: str = "auto"
    """``triton``, ``torch`` (their slow twins), or ``auto``: Triton on a GPU."""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError("invalid treespec config:\n  " + "\n  ".join(problems))

    def _problems(self) -> Iterator[str]:
        yield from _out_of_range(
            "num_speculative_tokens", self.num_speculative_tokens, 1, MAX_NODES
        )
        if not self.proposers:
            yield f"tree.proposers=[]: name at least one of {sorted(PROPOSERS)}"
        types = [proposer.type for proposer in self.proposers]
        for name in sorted({name for name in types if types.count(name) > 1}):
            yield f"tree.proposers: {name!r} is listed twice, list it once"
        for position, proposer in enumerate(self.proposers):
            for problem in proposer.problems():
                yield f"tree.proposers[{position}].{problem}"
        if self.kernels not in KERNELS:
            yield f"tree.kernels={self.kernels!r}: must be one of {list(KERNELS)}"

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
        _refuse_unknown("tree", tree, ("proposers", "kernels"))
        options: dict[str, Any] = {
            key: raw[key] for key in ("num_speculative_tokens",) if key in raw
        }
        if "kernels" in tree:
            options["kernels"] = tree["kernels"]
        if "proposers" in tree:
            _require("tree.proposers", tree["proposers"], list, "a list")
            options["proposers"] = tuple(
                _parse_proposer(f"tree.proposers[{position}]", proposer)
                for position, proposer in enumerate(tree["proposers"])
            )
        return cls(**options)

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
            },
        }


KERNELS = ("auto", "triton", "torch")


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
    return config(**{key: value for key, value in raw.items() if key != "type"})


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


def _require(where: str, value: Any, kind: type, wanted: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{where}={value!r}: must be {wanted}")


def _out_of_range(name: str, value: Any, low: int, high: int) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, int):
        yield f"{name}={value!r}: must be an integer"
    elif not low <= value <= high:
        yield f"{name}={value}: must be in [{low}, {high}]"
