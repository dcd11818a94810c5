"""Carries workers' reports through vLLM's scheduler to the stat loggers.

A worker's report rides on the model runner's output, and its increments go on inside
vLLM's own statistics of speculation, which vLLM sends to whichever process shows them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_treespec.integration.engine_args import has_trees

if TYPE_CHECKING:
    from vllm_treespec.integration.metrics import Increments

REPORT = "treespec_report"  # the attribute of a ModelRunnerOutput


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker says about a step."""

    increments: Increments
    verified: list[int]  # per request of the output, nodes verified
    rests: bool = False  # nobody drafts for the time being


@dataclass
class TreeDecodingStats(SpecDecodingStats):
    """vLLM's statistics of a step, and ours."""

    treespec: dict[str, list[float]] = field(default_factory=dict)  # Increments


@dataclass
class TreeRequestMetrics(RequestSpecDecodeMetrics):
    """vLLM's statistics of a request, of the steps in which it had a tree.

    With async scheduling vLLM schedules placeholders for drafts before there are any.
    """

    def observe(
        self, num_draft_tokens: int, num_accepted: int, detailed: bool = False
    ) -> None:
        if num_draft_tokens > 0:
            super().observe(num_draft_tokens, num_accepted, detailed)


def wrap_add_request(original: Callable[..., None]) -> Callable[..., None]:
    """Have a request's own statistics kept by ``TreeRequestMetrics``."""

    @functools.wraps(original)
    def add_request(self: Any, request: Any) -> None:
        original(self, request)
        metrics = request.spec_decode_metrics
        if has_trees(self.vllm_config) and type(metrics) is RequestSpecDecodeMetrics:
            request.spec_decode_metrics = TreeRequestMetrics(**vars(metrics))

    return add_request


def wrap_update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """Take the report, and have vLLM count nodes instead of what was scheduled."""

    @functools.wraps(original)
    def update(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        report: Report | None = vars(model_runner_output).pop(REPORT, None)
        if report is not None:
            self.treespec_increments = report.increments
            self.treespec_rests = report.rests
            _discount_padding(scheduler_output, model_runner_output.req_ids, report)
        return original(self, scheduler_output, model_runner_output)

    return update


def _discount_padding(
    scheduler_output: Any, req_ids: list[str], report: Report
) -> None:
    """Trees may have fewer nodes than were scheduled for them: vLLM takes the rest for
    drafts that a grammar ruled out, which it does not count."""
    scheduled = scheduler_output.scheduled_spec_decode_tokens
    invalid = dict(scheduler_output.num_invalid_spec_tokens or {})
    for req_id, verified in zip(req_ids, report.verified, strict=True):
        padding = len(scheduled.get(req_id, ())) - verified
        invalid[req_id] = max(invalid.get(req_id, 0), padding)
    scheduler_output.num_invalid_spec_tokens = invalid


def wrap_make_spec_decoding_stats(original: Callable[..., Any]) -> Callable[..., Any]:
    """Do not count placeholders of which none held a draft as a draft."""

    @functools.wraps(original)
    def make_spec_decoding_stats(
        self: Any,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
        if has_trees(self.vllm_config) and num_draft_tokens == invalid:
            return spec_decoding_stats
        stats: SpecDecodingStats | None = original(
            self,
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )
        return stats

    return make_spec_decoding_stats


def wrap_make_stats(original: Callable[..., Any]) -> Callable[..., Any]:
    """Send our increments along, whether or not vLLM has any of its own."""

    @functools.wraps(original)
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        increments: Increments = vars(self).pop("treespec_increments", {})
        if stats is not None and increments:
            native = stats.spec_decoding_stats
            if native is None:
                native = SpecDecodingStats.new(self.num_spec_tokens)
            stats.spec_decoding_stats = TreeDecodingStats(
                **vars(native), treespec=increments
            )
        return stats

    return make_stats
