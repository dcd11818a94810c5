"""The table of series, what shows it, and how reports get there."""

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prometheus_client
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_treespec.config import NgramConfig, SuffixConfig, TreeSpecConfig
from vllm_treespec.core.observe import StepCounts
from vllm_treespec.integration import carrier, metrics
from vllm_treespec.integration.fallback import chain_reason
from vllm_treespec.integration.reports import PendingReport, Reporter
from vllm_treespec.integration.seams import PATCHES, FieldPatch, SeamError
from vllm_treespec.integration.worth import Worth

DOCS = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
CONFIG = TreeSpecConfig(
    num_speculative_tokens=20, proposers=(NgramConfig(), SuffixConfig())
)
# Three requests: a tree of 5 whose path has 2 nodes, one in its prefill, one of 3, 0.
# Verified; by rank; drafted and accepted by proposer; emitted; exclusive by proposer.
COUNTS = StepCounts(
    torch.tensor(
        [
            [5, 1, 1, 0, 0, 0, 0, 0, 0, 0, 4, 2, 2, 1, 3, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
            [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 0, 0, 1, 0, 0],
        ]
    )
)


def batch(*decodes, num_draft_tokens=0):
    return SimpleNamespace(
        is_prefilling_np=~np.array(decodes),
        num_reqs=len(decodes),
        num_draft_tokens=num_draft_tokens,
    )


def reasons(*codes):
    return np.array(codes, np.int8)


def report(reporter, fallbacks=(0, 0, 0), seconds=(0.0, 0.0), gauges=()):
    totals = {"fallbacks": list(fallbacks), "draft_seconds": list(seconds)}
    pending = reporter.take(totals, dict(gauges))
    assert isinstance(pending, PendingReport)
    return pending.finish()


def test_a_report_has_a_steps_counts_and_what_was_added_to_the_totals():
    reporter = Reporter()
    reporter.verified(COUNTS)
    reporter.decoded(batch(True, False, True, num_draft_tokens=12), reasons(0, 0, 0))
    increments = report(
        reporter, (2, 0, 0), (0.5, 0.25), {"suffix_cached_tokens": [70]}
    ).increments
    assert increments == {
        "fallbacks": [2, 0, 0],
        "suffix_cached_tokens": [70],
        "steps_without_drafts": [0, 0, 0, 0, 0],
        "nodes_verified": [8],
        "padding_rows": [4],
        "acceptance_length": [3, 1],
        "tree_size": [5, 3],
        "accepted_by_rank": [1, 1, 0, 0, 0, 0, 0, 0, 0],
        "drafted_nodes": [6, 4],
        "accepted_nodes": [2, 1],
        "exclusively_accepted_nodes": [1, 0],
        "draft_seconds": [0.5, 0.25],
    }


def test_totals_are_reported_once_and_counts_with_their_own_step():
    reporter = Reporter()
    reporter.verified(COUNTS)
    reporter.decoded(batch(True, True, True, num_draft_tokens=8), reasons(0, 1, 2))
    first = report(reporter, fallbacks=(1, 0, 0), seconds=(1.0, 0.0))
    assert first.increments["steps_without_drafts"] == [0, 1, 0, 0, 0]
    assert first.verified == [5, 0, 3]
    reporter.decoded(batch(True, False, True, True), reasons(2, 1, 2, 0))
    second = report(reporter, fallbacks=(1, 0, 1), seconds=(1.5, 0.0))
    assert second.verified == [0, 0, 0, 0]
    assert second.increments == {
        "fallbacks": [0, 0, 1],
        "steps_without_drafts": [1, 0, 2, 0, 0],
        "draft_seconds": [0.5, 0.0],
    }
    reporter.verified(COUNTS)  # by a dummy run
    reporter.decoded(batch(True), reasons(0))
    third = report(reporter, fallbacks=(1, 0, 1), seconds=(1.5, 0.0))
    assert third.verified == [0]
    # vLLM may sample no tokens, for instance where there is nothing to do.
    assert reporter.take({}, {}) is None


@pytest.mark.parametrize(
    ("options", "custom"),
    [
        ({"thinking_token_budget": 9}, False),
        ({}, True),
        (None, False),
    ],
)
def test_the_reasons_of_fallbacks_are_those_of_the_table(options, custom):
    params = None
    if options is not None:
        params = SamplingParams()
        for name, value in options.items():
            setattr(params, name, value)
    reason = chain_reason(params, has_custom_processors=custom)
    assert reason in metrics.FALLBACK_REASONS


@pytest.fixture
def shown():
    """A stat logger of two engines, and what its registry shows by name and labels."""
    registry = prometheus_client.CollectorRegistry()

    def bound(kind):
        return lambda **options: kind(**options, registry=registry)

    stat_logger = SimpleNamespace(
        spec_decoding_prom=SimpleNamespace(observe=lambda stats, engine: None),
        per_engine_labelvalues={0: ["tiny", "0"], 3: ["tiny", "3"]},
        _counter_cls=bound(prometheus_client.Counter),
        _histogram_cls=bound(prometheus_client.Histogram),
        _gauge_cls=bound(prometheus_client.Gauge),
    )
    prom = metrics.TreeProm(stat_logger, CONFIG)

    def value(name, **labels):
        return registry.get_sample_value(
            f"vllm:treespec_{name}", {"model_name": "tiny", **labels}
        )

    return prom, value, registry


def stats(increments, drafts=()):
    made = carrier.TreeDecodingStats.new(20)
    for num_draft_tokens, num_accepted in drafts:
        made.observe_draft(num_draft_tokens, num_accepted)
    made.treespec = increments
    return made


def test_increments_add_up_per_engine_and_label(shown):
    prom, value, _ = shown
    assert value("fallbacks_total", engine="0", reason="thinking_budget") == 0
    assert value("drafted_nodes_total", engine="3", proposer="suffix") == 0
    for _ in range(2):
        prom.observe(
            stats(
                {
                    "fallbacks": [2, 0, 0],
                    "drafted_nodes": [6, 4],
                    "nodes_verified": [8],
                    "tree_size": [5, 3],
                    "acceptance_length": [],
                    "suffix_cached_tokens": [70],
                }
            ),
            3,
        )
    assert value("suffix_cached_tokens", engine="3") == 70
    assert value("suffix_cached_tokens", engine="0") == 0
    assert value("fallbacks_total", engine="3", reason="thinking_budget") == 4
    assert value("fallbacks_total", engine="3", reason="pooling") == 0
    assert value("fallbacks_total", engine="0", reason="thinking_budget") == 0
    assert value("drafted_nodes_total", engine="3", proposer="ngram") == 12
    assert value("drafted_nodes_total", engine="3", proposer="suffix") == 8
    assert value("nodes_verified_total", engine="3") == 16
    assert value("tree_size_sum", engine="3") == 16
    assert value("tree_size_count", engine="3") == 4
    assert value("tree_size_bucket", engine="3", le="4.0") == 2
    assert value("acceptance_length_count", engine="3") == 0


def test_every_length_and_size_has_a_bucket(shown):
    _, value, registry = shown
    for name in ("acceptance_length", "tree_size"):
        assert value(f"{name}_bucket", engine="0", le="21.0") == 0
    names = {metric.name for metric in registry.collect()}
    assert len(names) == len(metrics.SERIES)


def test_the_documented_series_are_the_declared_ones():
    declared = set()
    for series in metrics.SERIES:
        suffix = "_total" if series.kind == "counter" else ""
        labels = f"{{{series.label}}}" if series.label else ""
        declared.add(f"vllm:treespec_{series.name}{suffix}{labels}")
    documented = set(re.findall(r"^\| `(vllm:treespec_\S+)`", DOCS, re.MULTILINE))
    assert documented == declared
    for value in (
        *metrics.FALLBACK_REASONS,
        *metrics.NO_DRAFT_REASONS,
        *metrics.PHASES,
    ):
        assert f"`{value}`" in DOCS


def test_the_log_line_says_what_trees_came_to_and_starts_over():
    line, said = metrics.TreeLogLine(CONFIG), []

    def log():
        line.log(lambda form, *words: said.append(form % words))
        return said.pop() if said else None

    assert log() is None
    line.observe(
        stats(
            {
                "accepted_nodes": [3, 3],
                "exclusively_accepted_nodes": [1, 1],
                "steps_without_drafts": [1, 0, 0],
                "fallbacks": [1, 0, 0],
                "tree_size": [6, 4],
            },
            drafts=[(6, 3), (4, 1)],
        )
    )
    assert log() == (
        "Tree speculation: 3.00 tokens per step from 5.0 nodes, depths 1-4 reached by "
        "1.00 0.50 0.50 0.00; 33% of steps without drafts (nothing_offered 1); "
        "accepted nodes from ngram 75% (alone 25%), suffix 75% (alone 25%); "
        "1 requests drafted for as chains (thinking_budget 1)"
    )
    line.observe(stats({"steps_without_drafts": [0, 2, 0]}))
    assert log() == "Tree speculation: 100% of steps without drafts (resting 2)"
    assert log() is None


def test_increments_survive_the_trip_to_an_api_server(monkeypatch):
    field = next(each for each in PATCHES if isinstance(each, FieldPatch))
    field.install()
    sent = SchedulerStats(spec_decoding_stats=stats({"tree_size": [5, 3]}, [(5, 2)]))
    received = MsgpackDecoder(SchedulerStats).decode(MsgpackEncoder().encode(sent))
    assert received.spec_decoding_stats == sent.spec_decoding_stats
    assert received.spec_decoding_stats.treespec == {"tree_size": [5, 3]}


def test_a_field_of_another_type_is_refused():
    seam = FieldPatch(
        "vllm.v1.metrics.stats:SchedulerStats.num_running_reqs", str, bytes, why="test"
    )
    with pytest.raises(SeamError, match="expects <class 'str'>"):
        seam.install()


def test_padding_is_taken_for_drafts_that_a_grammar_ruled_out():
    scheduled = {"a": [1] * 8, "b": [1] * 8, "c": [1] * 8}
    output = SimpleNamespace(
        scheduled_spec_decode_tokens=scheduled, num_invalid_spec_tokens={"a": 6, "b": 1}
    )
    # Of each request's 8 rows, 5 held nodes; "d" had none scheduled.
    carrier._discount_padding(
        output, ["a", "b", "c", "d"], carrier.Report({}, [5, 5, 5, 0])
    )
    assert output.num_invalid_spec_tokens == {"a": 6, "b": 3, "c": 3, "d": 0}


def test_a_request_counts_only_steps_in_which_it_had_a_tree():
    kept = carrier.TreeRequestMetrics(**vars(RequestSpecDecodeMetrics.new(8)))
    kept.observe(0, 0, detailed=True)
    kept.observe(5, 2, detailed=True)
    assert kept.to_dict()["num_spec_steps"] == 1
    assert kept.to_dict()["mean_acceptance_length"] == 3


def test_times_do_not_pile_up_when_nobody_judges_by_them():
    worth = Worth(1, 4, adaptive=False, ranks=None, device=torch.device("cpu"))
    for _ in range(200):
        worth.stopwatch.step()
        worth.stopwatch.add(0, 0.5)
        worth.end_step()
    assert len(worth.stopwatch._intervals) < 64
    assert worth.stopwatch.seconds() == [100.0]


def test_fallbacks_keep_their_order():
    """Totals are passed in the table's order."""
    fallbacks = Counter({"pooling": 3, "thinking_budget": 1})
    assert [fallbacks[reason] for reason in metrics.FALLBACK_REASONS] == [1, 0, 3]


def test_worth_adds_up_what_steps_came_to():
    worth = Worth(2, 4, adaptive=False, ranks=None, device=torch.device("cpu"))
    worth.observe(COUNTS)
    worth.observe(COUNTS)
    assert worth._counts.tolist() == [[10, 2, 0]]
