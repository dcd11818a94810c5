"""What a soak's record says: tables, and everything that was wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vllm_treespec.testing.bench import print_table
from vllm_treespec.testing.servers import Scrape, Server
from vllm_treespec.testing.soak import Record, Tally

WARM_UP = 0.5  # of the time; memory is not judged before
# Each kind of request costs memory when it comes first, so short soaks see growth.
MIN_SECONDS_TO_JUDGE = 300.0
MAX_GROWTH_MB_PER_MIN = 2.0


class KindRow(NamedTuple):
    kind: str
    asked: int
    right: int
    wrong: int
    lost: int
    aborted: int
    p50_s: float
    p90_s: float
    p99_s: float


class Fact(NamedTuple):
    what: str
    value: str


class Growth(NamedTuple):
    """A straight line through what memory was after the warm-up."""

    mb_per_min: float
    error: float  # standard error of the former, as if samples were independent


def growth(memory_mb: Sequence[tuple[float, float]]) -> Growth:
    samples = np.array(memory_mb)
    late = samples[samples[:, 0] >= WARM_UP * samples[-1, 0]]
    minutes, size = late[:, 0] / 60, late[:, 1]
    spread = minutes - minutes.mean()
    slope = float(spread @ size / (spread @ spread))
    residual = size - size.mean() - slope * spread
    variance = residual @ residual / (len(late) - 2) / (spread @ spread)
    return Growth(slope, float(np.sqrt(variance)))


def wait_until_idle(server: Server) -> str | None:
    """What a server whose clients have all left still holds on to; None: nothing."""
    for _ in range(40):
        metrics = Scrape(server)
        held = {
            name: metrics(name)
            for name in ("num_requests_running", "num_requests_waiting")
        }
        held["kv_cache_usage_perc"] = metrics("kv_cache_usage_perc")
        if not any(held.values()):
            return None
        time.sleep(0.5)
    return f"an idle server still has {held}"


def problems(
    record: Record, metrics: Callable[[str], float], cached_tokens: int
) -> Iterator[str]:
    """Everything that was wrong, and everything that the soak failed to provoke."""
    for tally in record.tallies.values():
        yield from (f"wrong: {each}" for each in tally.wrong)
        yield from (f"lost: {each}" for each in tally.lost)
    for name in ("num_preemptions_total", "spec_decode_num_accepted_tokens_total"):
        if metrics(name) == 0:
            yield f"nothing was tried: {name} is 0"
    if metrics("treespec_fallbacks_total") > 0:
        yield f"{metrics('treespec_fallbacks_total'):.0f} requests lost their trees"
    if record.num_tokens_in_all < 2 * cached_tokens:
        yield f"the suffix cache of {cached_tokens} tokens was not filled twice"
    if record.seconds < MIN_SECONDS_TO_JUDGE:
        return
    slope, error = growth(record.memory_mb)
    if slope - 3 * error > MAX_GROWTH_MB_PER_MIN:
        yield f"memory grew by {slope:.1f} +- {error:.1f} MB/min"


def print_report(record: Record, metrics: Scrape, cached_tokens: int) -> None:
    rows = [_row(kind, record.tallies[kind]) for kind in sorted(record.tallies)]
    print_table("Requests", [*rows, _total(record)])
    print_table("Server", list(_facts(record, metrics, cached_tokens)))


def _row(kind: str, tally: Tally) -> KindRow:
    return KindRow(
        kind,
        tally.num_asked,
        tally.num_right,
        len(tally.wrong),
        len(tally.lost),
        tally.num_aborted,
        *np.percentile(tally.latencies_s or [np.nan], (50, 90, 99)).tolist(),
    )


def _total(record: Record) -> KindRow:
    total = Tally()
    for tally in record.tallies.values():
        total.num_asked += tally.num_asked
        total.num_aborted += tally.num_aborted
        total.num_right += tally.num_right
        total.latencies_s += tally.latencies_s
        total.wrong += tally.wrong
        total.lost += tally.lost
    return _row("all", total)


def _facts(record: Record, metrics: Scrape, cached_tokens: int) -> Iterator[Fact]:
    slope, error = growth(record.memory_mb)
    trees = metrics("spec_decode_num_drafts_total")
    accepted = metrics("spec_decode_num_accepted_tokens_total")
    yield Fact("seconds", f"{record.seconds:.0f}")
    yield Fact("tokens received", str(record.num_tokens))
    yield Fact("trees verified", f"{trees:.0f}")
    yield Fact("mean acceptance length", f"{1 + accepted / trees:.2f}")
    yield Fact("preemptions", f"{metrics('num_preemptions_total'):.0f}")
    turnover = (
        f"{record.num_tokens_in_all / cached_tokens:.1f} x {cached_tokens} tokens"
    )
    yield Fact("through the suffix cache", turnover)
    steps = np.linspace(0, len(record.memory_mb) - 1, 6).astype(int)
    over_time = [f"{record.memory_mb[step][1]:.0f}" for step in steps]
    yield Fact("memory at every fifth of the time, MB", " ".join(over_time))
    yield Fact("memory growth, MB/min", f"{slope:.2f} +- {error:.2f}")
