"""Starts as vLLM's GPU worker does, with CUDA graphs that are recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engine.gpu_startup import GpuStartup
from vllm_treespec.integration.cuda_graphs import GraphedRows
from vllm_treespec.testing.fake_cuda import FakeEvent, reachable_storages

ORDER = ["profile", "profile's cache", "capture", "cache", "warm up", "capture"]


@pytest.fixture
def gpu() -> Iterator[GpuStartup]:
    with GpuStartup() as fake:
        yield fake


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches drafted from graphs, each compared with what Python does."""
    sizes: list[int] = []
    run = GraphedRows.__call__

    def compared(self: GraphedRows, num_rows: int) -> None:
        if not self._sizes or num_rows > self._sizes[-1]:
            return run(self, num_rows)
        size = next(size for size in self._sizes if size >= num_rows)
        memory = [
            torch.empty(0, dtype=torch.uint8).set_(each)
            for each in self._graphs[size].memory.values()
        ]
        before = [each.clone() for each in memory]
        run(self, num_rows)
        from_graph = [each.clone() for each in memory]
        for place, contents in zip(memory, before, strict=True):
            place.copy_(contents)
        self._run(size)
        for place, contents in zip(memory, from_graph, strict=True):
            assert torch.equal(place, contents), (
                "a graph does what Python no longer does"
            )
        sizes.append(size)

    monkeypatch.setattr(GraphedRows, "__call__", compared)
    return sizes


def proposers_of(name: str, draft_path: Callable[..., str]) -> list[dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {
        "suffix": {"type": "suffix"},
        "recycle": {"type": "recycle", "k": 6, "depth": 4},
        "draft_model": {
            "type": "draft_model",
            "model": draft_path("llama"),
            "depth": 3,
            "width": 3,
        },
        "layer_skip": {"type": "layer_skip", "skip": {"attention": [1, 2]}, "depth": 3},
    }
    return list(known.values()) if name == "all" else [known[name]]


@pytest.mark.parametrize(
    "name", ["suffix", "recycle", "draft_model", "layer_skip", "all"]
)
def test_starts_and_serves_from_graphs(
    name, gpu, replayed, deep_model_path, draft_path, prompts, start, plain_greedy
):
    model, batch = deep_model_path("llama"), prompts(4)
    expected = plain_greedy(model, batch)
    engine = start(
        model,
        tree={"proposers": proposers_of(name, draft_path), "kernels": "triton"},
        max_num_seqs=4,
        max_num_batched_tokens=256,
    )
    assert gpu.order == ORDER
    assert gpu.profiled and not gpu.profiled & reachable_storages(gpu.roots).keys()
    assert engine.greedy(batch) == expected
    engine.llm.sleep(level=1)  # caches come back without their contents
    engine.llm.wake_up()
    assert engine.greedy(batch) == expected
    assert sum(graph.num_replays for graph in gpu.graphs) > 4
    assert bool(replayed) == (name not in ("suffix", "recycle"))
    assert not engine.runner.speculator.drafts.faulty


def test_the_profiles_graphs_are_not_replayed_in_the_warm_up(
    gpu, deep_model_path, draft_path, start, monkeypatch
):
    """Were they kept, they would read and write a KV cache that is gone."""
    monkeypatch.setattr(GraphedRows, "release", lambda _: None)
    engine = start(
        deep_model_path("llama"),
        tree={
            "proposers": proposers_of("draft_model", draft_path),
            "kernels": "triton",
        },
        max_num_seqs=4,
        max_num_batched_tokens=256,
    )
    assert engine.runner.speculator.drafts.faulty


def test_a_graph_is_captured_where_everything_is_prepared_and_not_by_default(gpu):
    rows = GraphedRows(lambda _: None)
    with pytest.raises(AssertionError, match="non-default stream"):
        rows.capture(1)
    with gpu.on_stream(torch.cuda.Stream()):
        with pytest.raises(AssertionError, match="nothing was prepared"):
            rows.capture(1)
        with gpu.prepared():
            rows.capture(1)


def capture(gpu: GpuStartup, run: Callable[[int], None]) -> GraphedRows:
    rows = GraphedRows(run)
    with gpu.prepared(), gpu.on_stream(torch.cuda.Stream()):
        rows.capture(2)
    return rows


def test_a_replay_does_what_was_recorded_to_the_same_memory(gpu):
    numbers, doubles, switch = torch.arange(2), torch.zeros(2).long(), [2]
    gpu.roots = [numbers, doubles]

    def run(num_rows: int) -> None:
        doubles[:num_rows] = numbers[:num_rows] * switch[0]

    rows = capture(gpu, run)
    numbers += 10
    switch[0] = 3  # too late
    rows(2)
    assert doubles.tolist() == [20, 22]


def test_memory_that_nobody_holds_is_named_when_its_graph_is_replayed(gpu):
    held, lost = torch.zeros(2), torch.ones(2)
    gpu.roots = [held]
    rows = capture(gpu, lambda num_rows: held[:num_rows].add_(lost[:num_rows]))
    with pytest.raises(AssertionError, match="8 bytes for aten"):
        rows(1)
    gpu.roots.append({"deep": [lost]})
    held.zero_()
    rows(1)
    assert held.tolist() == [1, 0]


@pytest.mark.parametrize(
    "run",
    [
        lambda _: torch.ones(2).sum().item(),
        lambda _: torch.ones(2).nonzero(),
        lambda _: torch.tensor([1, 2]),
    ],
)
def test_what_waits_cannot_be_captured(gpu, run):
    with pytest.raises(AssertionError, match=r"waits|copied from the host"):
        capture(gpu, run)


def test_an_event_happens_later_and_who_waits_for_it_is_known(gpu):
    event = torch.cuda.Event()
    event.record()
    assert not event.query()
    event.synchronize()
    assert event.query() and len(FakeEvent.waits) == 1
    assert "test_gpu_startup" in FakeEvent.waits[0]


@pytest.mark.parametrize("why", ["rest", "no room", "not wanted", "failed"])
def test_steps_in_which_nobody_drafts_on_the_host_wait_for_nothing(
    why, gpu, model_path, prompts, start, plain_greedy
):
    model, batch = model_path("llama"), prompts(8, longest=20)
    options = {"ignore_eos": True}
    expected = plain_greedy(model, batch, params=options)
    tree = {
        "adaptive": False,
        "kernels": "triton",
        "max_rows": 9 if why == "no room" else 2**16,
    }
    engine = start(model, tree=tree, max_num_batched_tokens=256, async_scheduling=True)
    hosted = engine.runner.speculator.hosted
    if why == "rest":
        engine.runner.speculator._worth._roster.drafting[:] = [False]
    if why == "failed":
        hosted.pool.is_dismissed[0] = True
    wanted = {"treespec_max_nodes": 0} if why == "not wanted" else {}
    FakeEvent.waits.clear()
    assert engine.greedy(batch, extra_args=wanted, **options) == expected
    assert not [each for each in FakeEvent.waits if "vllm_treespec" in each]
    engine.runner.speculator._worth._roster.drafting[:] = [True]
    if why != "failed":  # nothing was missed meanwhile
        assert engine.greedy(batch[:4], **options) == expected[:4]
        assert hosted.hits[0] > 4
        assert [each for each in FakeEvent.waits if "vllm_treespec" in each]
