"""What operators see: the ``vllm:treespec_*`` series and a log line.

``SERIES`` is their only list. Workers report increments under these names, see
``reports.py``; vLLM's stat loggers of any process show them.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.observe import MAX_RANK
from vllm_treespec.integration.engine_args import from_vllm_config, has_trees

logger = logging.getLogger(f"vllm.{__name__}")

# Series -> what is to be added: of a counter a number per label value, of a histogram
# any number of observations; of a gauge, what it now is.
Increments = dict[str, list[float]]

PREFIX = "vllm:treespec_"
# All that ``fallback.chain_reason`` can say.
FALLBACK_REASONS = ("thinking_budget", "logits_processors", "pooling")
NOTHING_OFFERED, RESTING, NOT_SCHEDULED, NOT_WANTED, BUSY = range(5)
NO_DRAFT_REASONS = (
    *("nothing_offered", "resting", "not_scheduled", "not_wanted"),
    "busy",
)
BUILD, VERIFY, COMMIT = range(3)
PHASES = ("build", "verify", "commit")
RANKS = (*map(str, range(MAX_RANK)), f"{MAX_RANK}+")
LOGGED_DEPTHS = 4


def _buckets(config: TreeSpecConfig) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... past the largest tree, its root included."""
    limit = config.num_speculative_tokens + 1
    steps = sorted({1, *(size << power for size in (2, 3) for power in range(10))})
    return [step for step in steps if step < limit] + [limit]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of the table. ``name`` is without prefix and Prometheus's suffixes."""

    name: str
    kind: str  # a key of RECORD
    help: str
    label: str | None = None  # besides vLLM's model_name and engine
    values: Callable[[TreeSpecConfig], Sequence[str]] = lambda _: ()  # of the label

    def create(self, stat_logger: Any, config: TreeSpecConfig) -> dict[int, list[Any]]:
        """Engine -> a Prometheus object per label value, all of them at zero."""
        options: dict[str, Any] = {}
        if self.kind == "histogram":
            options["buckets"] = _buckets(config)
        if self.kind == "gauge":
            options["multiprocess_mode"] = "mostrecent"
        labels = [] if self.label is None else [self.label]
        metric = getattr(stat_logger, f"_{self.kind}_cls")(
            name=PREFIX + self.name,
            documentation=self.help,
            labelnames=["model_name", "engine", *labels],
            **options,
        )
        suffixes = [[value] for value in self.values(config)] if labels else [[]]
        return {
            engine: [metric.labels(*common, *suffix) for suffix in suffixes]
            for engine, common in stat_logger.per_engine_labelvalues.items()
        }


def _proposers(config: TreeSpecConfig) -> Sequence[str]:
    return config.proposer_names


def _hosted(config: TreeSpecConfig) -> Sequence[str]:
    first = len(config.proposers) - len(config.hosted_proposers)
    return config.proposer_names[first:]


SERIES = (
    Series(
        name="fallbacks",
        kind="counter",
        help="Requests drafted for as a chain, again after each preemption.",
        label="reason",
        values=lambda _: FALLBACK_REASONS,
    ),
    Series(
        name="steps_without_drafts",
        kind="counter",
        help="Decode steps of requests in which no draft was verified.",
        label="reason",
        values=lambda _: NO_DRAFT_REASONS,
    ),
    Series(
        name="nodes_verified",
        kind="counter",
        help="Tree nodes that went through the target, roots excluded.",
    ),
    Series(
        name="padding_rows",
        kind="counter",
        help="Rows of the target's batches scheduled for drafts that held none.",
    ),
    Series(
        name="acceptance_length",
        kind="histogram",
        help="Tokens emitted per verified tree, the target's own included.",
    ),
    Series(
        name="tree_size",
        kind="histogram",
        help="Nodes per verified tree, the root excluded.",
    ),
    Series(
        name="accepted_by_rank",
        kind="counter",
        help="Accepted nodes by how many siblings were thought better.",
        label="rank",
        values=lambda _: RANKS,
    ),
    Series(
        name="drafted_nodes",
        kind="counter",
        help="Verified nodes that the proposer suggested, alone or with others.",
        label="proposer",
        values=_proposers,
    ),
    Series(
        name="accepted_nodes",
        kind="counter",
        help="Accepted nodes that the proposer suggested, alone or with others.",
        label="proposer",
        values=_proposers,
    ),
    Series(
        name="exclusively_accepted_nodes",
        kind="counter",
        help="Accepted nodes that only this proposer suggested.",
        label="proposer",
        values=_proposers,
    ),
    Series(
        name="draft_seconds",
        kind="counter",
        help="Time the proposer spent on drafts.",
        label="proposer",
        values=_proposers,
    ),
    Series(
        name="proposer_faults",
        kind="counter",
        help="Proposers that failed or stalled and are off until restart.",
        label="proposer",
        values=_proposers,
    ),
    Series(
        name="lookups",
        kind="counter",
        help="Times that the proposer was asked for drafts of a request.",
        label="proposer",
        values=_hosted,
    ),
    Series(
        name="lookup_hits",
        kind="counter",
        help="Of those, times that it had any.",
        label="proposer",
        values=_hosted,
    ),
    Series(
        name="suffix_cached_tokens",
        kind="gauge",
        help="Tokens of prompts and outputs that the suffix proposer remembers.",
    ),
    Series(
        name="phase_seconds",
        kind="counter",
        help="Time of a step's phases beside drafting and the target's forward pass.",
        label="phase",
        values=lambda _: PHASES,
    ),
)


def _add(metrics: list[Any], values: Sequence[float]) -> None:
    for metric, value in zip(metrics, values, strict=True):
        metric.inc(value)


def _observe(metrics: list[Any], values: Sequence[float]) -> None:
    for value in values:
        metrics[0].observe(value)


def _set(metrics: list[Any], values: Sequence[float]) -> None:
    for metric, value in zip(metrics, values, strict=True):
        metric.set(value)


RECORD = {"counter": _add, "histogram": _observe, "gauge": _set}


class TreeProm:
    """Takes the place of vLLM's ``SpecDecodingProm`` and adds our series to its own."""

    def __init__(self, stat_logger: Any, config: TreeSpecConfig) -> None:
        self._native = stat_logger.spec_decoding_prom
        self._metrics = {
            series.name: (RECORD[series.kind], series.create(stat_logger, config))
            for series in SERIES
        }

    def observe(self, stats: Any, engine_idx: int = 0) -> None:
        self._native.observe(stats, engine_idx)
        for name, values in stats.treespec.items():
            record, metrics = self._metrics[name]
            record(metrics[engine_idx], values)

    def forget(self) -> None:
        """Nothing is remembered any more; the next report comes with the next step."""
        _, metrics = self._metrics["suffix_cached_tokens"]
        for engine in metrics.values():
            _set(engine, [0])


class TreeLogLine:
    """Takes the place of vLLM's ``SpecDecodingLogging``, which has a number per node."""

    def __init__(self, config: TreeSpecConfig) -> None:
        self._proposers = config.proposer_names
        self.reset()

    def reset(self) -> None:
        self._num_drafts = self._num_nodes = self._num_accepted = 0
        self._by_depth: Counter[int] = Counter()
        self._sums: dict[str, Counter[int]] = {
            series.name: Counter() for series in SERIES if series.kind == "counter"
        }

    def observe(self, stats: Any) -> None:
        self._num_drafts += stats.num_drafts
        self._num_nodes += stats.num_draft_tokens
        self._num_accepted += stats.num_accepted_tokens
        self._by_depth.update(
            dict(enumerate(stats.num_accepted_tokens_per_pos[:LOGGED_DEPTHS]))
        )
        for name, values in stats.treespec.items():
            if name in self._sums:
                self._sums[name].update(dict(enumerate(values)))

    def log(self, log_fn: Callable[..., None] = logger.info) -> None:
        if parts := list(self._parts()):
            log_fn("Tree speculation: %s", "; ".join(parts))
        self.reset()

    def _parts(self) -> Iterator[str]:
        if trees := self._num_drafts:
            reached = " ".join(
                f"{self._by_depth[depth] / trees:.2f}" for depth in range(LOGGED_DEPTHS)
            )
            yield (
                f"{1 + self._num_accepted / trees:.2f} tokens per step from "
                f"{self._num_nodes / trees:.1f} nodes, depths 1-{LOGGED_DEPTHS} "
                f"reached by {reached}"
            )
        without = self._sums["steps_without_drafts"]
        if total := sum(without.values()):
            yield (
                f"{total / (total + trees):.0%} of steps without drafts ("
                f"{_named(NO_DRAFT_REASONS, without)})"
            )
        if accepted := self._num_accepted:
            yield "accepted nodes from " + ", ".join(
                f"{name} {self._sums['accepted_nodes'][index] / accepted:.0%} (alone "
                f"{self._sums['exclusively_accepted_nodes'][index] / accepted:.0%})"
                for index, name in enumerate(self._proposers)
            )
        if fallbacks := self._sums["fallbacks"].total():
            reasons = _named(FALLBACK_REASONS, self._sums["fallbacks"])
            yield f"{fallbacks:.0f} requests drafted for as chains ({reasons})"


def _named(names: Sequence[str], counts: Counter[int]) -> str:
    return ", ".join(
        f"{name} {counts[index]:.0f}"
        for index, name in enumerate(names)
        if counts[index]
    )


def wrap_prometheus_logger(original: Callable[..., None]) -> Callable[..., None]:
    """Give an engine with trees our series."""

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, engine_indexes: Any = None) -> None:
        original(self, vllm_config, engine_indexes)
        if has_trees(vllm_config):
            self.spec_decoding_prom = TreeProm(self, from_vllm_config(vllm_config))

    return init


def wrap_text_logger(original: Callable[..., None]) -> Callable[..., None]:
    """Give an engine with trees our log line."""

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, engine_index: int = 0) -> None:
        original(self, vllm_config, engine_index)
        if has_trees(vllm_config):
            self.spec_decoding_logging = TreeLogLine(from_vllm_config(vllm_config))

    return init
