"""Which CUDA graphs vLLM's own manager captures and replays, on a machine without any."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_treespec.core.schedule import graphed_batches
from vllm_treespec.integration.decode_graphs import choose_decode_graphs
from vllm_treespec.integration.engine_args import wrap_create_engine_config
from vllm_treespec.integration.sizing import tiers

TARGET = "models/python-stdlib/target"
FULL_AND_PIECEWISE = CUDAGraphMode.FULL_AND_PIECEWISE


@pytest.fixture
def manager_of(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., cudagraph_utils.CudaGraphManager]:
    """vLLM's manager as if it had captured, with or without our choice of graphs."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    stage = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: stage)
    monkeypatch.setattr(
        type(current_platform), "get_global_graph_pool", lambda _: None, raising=False
    )
    create = wrap_create_engine_config(EngineArgs.create_engine_config)

    def make(
        *,
        max_num_seqs: int,
        nodes: int = 31,
        max_rows: int = 256,
        mode: CUDAGraphMode = FULL_AND_PIECEWISE,
        chosen: bool = True,
        loras: list[int] | None = None,
        **compilation: Any,
    ) -> cudagraph_utils.CudaGraphManager:
        tree = {"proposers": [{"type": "suffix"}], "max_rows": max_rows}
        config = create(
            EngineArgs(
                TARGET,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=8192,
                speculative_config={
                    "method": "treespec",
                    "num_speculative_tokens": nodes,
                    "tree": tree,
                },
            )
        )
        # The CPU platform allows no graphs: decide their sizes as on a GPU.
        config.compilation_config = CompilationConfig(
            cudagraph_mode=mode, **compilation
        )
        config.model_config.enforce_eager = False
        config._set_cudagraph_sizes()
        manager = cudagraph_utils.CudaGraphManager(
            config, None, mode, nodes + 1, lora_capture_cases=loras
        )
        if chosen:
            choose_decode_graphs(manager, config)
        manager._graphs_captured = True
        return manager

    return make


def decode(
    manager: cudagraph_utils.CudaGraphManager,
    num_reqs: int,
    num_nodes: int,
    loras: int = 0,
) -> Any:
    """What a batch of decoding requests runs in."""
    num_rows = num_nodes + 1
    return manager.dispatch(num_reqs, num_reqs * num_rows, num_rows, loras)


@pytest.mark.parametrize(
    ("max_num_seqs", "nodes", "max_rows"),
    [
        (1, 31, 256),
        (8, 31, 256),
        (100, 31, 256),
        (256, 31, 256),
        (1000, 7, 512),
        (16, 63, 1024),
        (48, 12, 256),
        (5, 1, 2),
    ],
)
def test_every_decode_batch_has_a_whole_graph_and_little_padding(
    max_num_seqs, nodes, max_rows, manager_of
):
    manager = manager_of(max_num_seqs=max_num_seqs, nodes=nodes, max_rows=max_rows)
    for first, last, num_nodes in tiers(manager.vllm_config):
        for num_reqs in range(first, min(last, 512) + 1):
            graph = decode(manager, num_reqs, num_nodes)
            assert graph.cg_mode == CUDAGraphMode.FULL
            assert graph.uniform_token_count == num_nodes + 1
            assert num_reqs <= graph.num_reqs
            if num_nodes:
                assert graph.num_reqs <= max(num_reqs + 1, num_reqs * 1.125)
        # Requests ended, and the others still have as many drafts.
        if num_nodes:
            assert decode(manager, 1, num_nodes).cg_mode == CUDAGraphMode.FULL


@pytest.mark.parametrize("max_num_seqs", [1, 8, 64, 256])
def test_steps_without_drafts_have_the_graphs_of_no_speculation(
    max_num_seqs, manager_of
):
    manager = manager_of(max_num_seqs=max_num_seqs)
    plain = manager_of(max_num_seqs=max_num_seqs, chosen=False)
    plain.vllm_config.speculative_config = None
    plain = cudagraph_utils.CudaGraphManager(
        plain.vllm_config, None, FULL_AND_PIECEWISE, 1
    )
    plain._graphs_captured = True
    for num_reqs in range(1, max_num_seqs + 1):
        assert decode(manager, num_reqs, 0) == decode(plain, num_reqs, 0)


def test_there_are_few_graphs(manager_of):
    """vLLM combines all sizes with all budgets, and does not cover 1024 rows."""
    full = CUDAGraphMode.FULL
    chosen = manager_of(max_num_seqs=256)._capture_descs[full]
    combined = manager_of(max_num_seqs=256, chosen=False)._capture_descs[full]
    assert len(combined) > 200 and len(chosen) < 80
    assert (len(combined), len(chosen)) == (230, 75)  # as docs/operations.md says
    assert max(desc.num_tokens for desc in chosen) == 256
    sizes = [desc.num_tokens for desc in chosen]
    assert sizes == sorted(sizes, reverse=True)  # the largest is captured first
    uncovered = manager_of(max_num_seqs=16, nodes=63, max_rows=1024, chosen=False)
    assert decode(uncovered, 9, 63).cg_mode != full


def test_lower_limits_of_the_user_hold(manager_of):
    manager = manager_of(max_num_seqs=8, cudagraph_capture_sizes=[1, 2, 96])
    graphs = manager._capture_descs[CUDAGraphMode.FULL]
    found = {(desc.uniform_token_count, desc.num_reqs) for desc in graphs}
    assert found == {(32, 1), (32, 2), (32, 3), (1, 1), (1, 2), (1, 8)}
    assert decode(manager, 4, 31).cg_mode != CUDAGraphMode.FULL


def test_mixed_batches_keep_their_graphs(manager_of):
    manager = manager_of(max_num_seqs=8)
    plain = manager_of(max_num_seqs=8, chosen=False)
    piecewise = CUDAGraphMode.PIECEWISE
    assert manager._capture_descs[piecewise] == plain._capture_descs[piecewise]
    for num_tokens in range(1, 600):
        mixed = manager.dispatch(8, num_tokens, None, 0)
        assert mixed == plain.dispatch(8, num_tokens, None, 0)


def test_every_number_of_adapters_has_its_graphs(manager_of):
    manager = manager_of(max_num_seqs=8, loras=[0, 1, 2])
    for loras in (0, 1, 2):
        graph = decode(manager, 3, 31, loras)
        assert (graph.cg_mode, graph.num_reqs) == (CUDAGraphMode.FULL, 3)
        assert graph.num_active_loras == loras


@pytest.mark.parametrize(
    "mode", [CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL]
)
def test_modes_without_graphs_of_their_own_for_decoding_are_left_alone(
    mode, manager_of
):
    found = manager_of(max_num_seqs=8, mode=mode)
    kept = manager_of(max_num_seqs=8, mode=mode, chosen=False)
    assert found._capture_descs == kept._capture_descs
    assert found._candidates == kept._candidates


@pytest.mark.parametrize(
    ("first", "last"), [(1, 1), (1, 8), (9, 16), (65, 128), (5, 67)]
)
def test_batches_are_padded_by_an_eighth_at_most(first, last):
    sizes = graphed_batches(first, last)
    assert sizes == sorted(set(sizes)) and sizes[-1] == last
    for num_reqs in range(first, last + 1):
        padded = next(size for size in sizes if size >= num_reqs)
        assert padded <= num_reqs * 1.125
    assert len(sizes) <= 8 * (last.bit_length() - first.bit_length() + 1)
