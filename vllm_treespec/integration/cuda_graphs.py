"""Replays a batch-shaped piece of work from CUDA graphs, where there are any."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch
from vllm.platforms import current_platform


class GraphedRows:
    """A function of a number of batch rows that reads and writes persistent buffers.

    It must have static shapes for that number, must not wait for the device, and must
    cope with rows of padding, for a batch runs in the next larger graph.
    """

    def __init__(self, run: Callable[[int], None]) -> None:
        self._run = run
        self._sizes: list[int] = []  # ascending
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def release(self) -> None:
        """Forget the graphs: what they read and write is about to be replaced."""
        self._sizes, self._graphs = [], {}

    def capture(self, max_num_rows: int) -> None:
        """Capture for powers of two up to the largest batch; call it inside vLLM's
        ``graph_capture``, which sets a stream for it and prepares collectives."""
        self._sizes, self._graphs = capture_sizes(max_num_rows), {}
        pool = current_platform.get_global_graph_pool()
        # The largest first, so that the others reuse its memory.
        for size in reversed(self._sizes):
            self._run(size)  # compiles, outside the graph
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                self._run(size)
            self._graphs[size] = graph

    def __call__(self, num_rows: int) -> None:
        place = bisect.bisect_left(self._sizes, num_rows)
        if place == len(self._sizes):
            self._run(num_rows)
        else:
            self._graphs[self._sizes[place]].replay()


def capture_sizes(max_num_rows: int) -> list[int]:
    """Powers of two below the maximum, and the maximum; nothing for 0."""
    sizes = [1 << power for power in range(max_num_rows.bit_length())]
    return sorted(
        {*(size for size in sizes if size < max_num_rows), max_num_rows} - {0}
    )
