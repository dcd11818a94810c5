"""How long drafting takes, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch


class Stopwatch:
    """Sums seconds per lap name; on a GPU between events that are read later."""

    def __init__(self, num_laps: int, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        self._seconds = [0.0] * num_laps
        self._last_read = [0.0] * num_laps
        self._pending: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._intervals: list[float] = []
        self._last_step: float | None = None

    def step(self) -> None:
        """A step begins; the time since the last one is its duration."""
        now = time.perf_counter()
        if self._last_step is not None:
            self._intervals.append(now - self._last_step)
        self._last_step = now

    def add(self, lap: int, seconds: float) -> None:
        self._seconds[lap] += seconds

    @contextmanager
    def measure(self, lap: int) -> Iterator[None]:
        """Time what is enqueued inside."""
        if self._on_cpu:
            start = time.perf_counter()
            yield
            self.add(lap, time.perf_counter() - start)
            return
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._pending.append((lap, begin, end))

    def seconds(self) -> list[float]:
        """Per lap, all that is known to have ended since the start."""
        still_running = []
        for lap, begin, end in self._pending:
            if end.query():  # type: ignore[no-untyped-call]
                self._seconds[lap] += begin.elapsed_time(end) / 1e3
            else:
                still_running.append((lap, begin, end))
        self._pending = still_running
        return list(self._seconds)

    def read(self) -> tuple[list[float], float]:
        """Seconds per lap and of all steps since the last call.

        A pause between requests is no step: the total is that of as many median ones.
        """
        seconds, intervals = self.seconds(), self._intervals
        since = [now - then for now, then in zip(seconds, self._last_read, strict=True)]
        self._last_read, self._intervals = seconds, []
        return since, median(intervals) * len(intervals) if intervals else 0.0
