from types import SimpleNamespace

import numpy as np
import torch

from vllm_treespec.core.verify.target_walk import AcceptedPaths
from vllm_treespec.integration.node_rows import (
    NodeAdapters,
    VerifiedRows,
    follow_paths_in_outputs,
    path_rows,
    sum_on_paths,
)


def batch_and_paths():
    """A prompt's last chunk of three tokens, a tree of four nodes of which the path
    0-2-3 was accepted, and one of two nodes of which only the root was."""
    batch = SimpleNamespace(
        num_reqs=3,
        num_draft_tokens=4,
        cu_num_logits=torch.tensor([0, 1, 5, 7], dtype=torch.int32),
        expanded_local_pos=torch.tensor([0, 0, 1, 2, 3, 0, 1], dtype=torch.int32),
        logits_indices=torch.tensor([2, 3, 4, 5, 6, 7, 8]),
    )
    stale = 9
    paths = AcceptedPaths(
        nodes=torch.tensor([[0, 1, 1, 1], [0, 2, 3, stale], [0, stale, 1, 1]]),
        lengths=torch.tensor([0, 2, 0], dtype=torch.int32),
    )
    return batch, paths


def test_the_rows_of_a_path_come_first_and_the_root_fills_up():
    batch_rows, rows = path_rows(*batch_and_paths())
    assert batch_rows.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert rows.tolist() == [0, 1, 3, 4, 1, 5, 5]


def test_what_is_counted_at_nodes_is_summed_along_the_path_alone():
    counts = torch.tensor([1, 10, 100, 1000, 10000, 5, 50], dtype=torch.int32)
    assert sum_on_paths(counts, *batch_and_paths()).tolist() == [1, 11010, 5]


def test_adapters_are_mapped_to_every_row_of_logits():
    adapters = NodeAdapters(4)
    adapters.lora_ids[:] = [7, 0, 8, 9]
    adapters.num_logits = np.array([1, 4, 2])
    of_rows, of_tokens, _ = adapters.make_lora_inputs(
        ["a", "b", "c"], np.array([2, 0, 3]), np.array([3, 4, 2])
    )
    assert of_rows == (8, 7, 7, 7, 7, 9, 9)
    assert of_tokens == (8, 8, 8, 7, 7, 7, 7, 9, 9)


def test_routed_experts_are_taken_from_the_rows_of_the_path():
    batch, paths = batch_and_paths()
    pending = SimpleNamespace(routed_experts_gpu=torch.arange(9, dtype=torch.uint8))
    connector = SimpleNamespace(prepare_output=lambda batch: pending)
    follow_paths_in_outputs(connector, paths)
    experts = connector.prepare_output(batch).routed_experts_gpu.tolist()
    assert experts[:3] == [0, 1, 2], "a prompt's rows are its tokens'"
    assert experts[3:6] == [3, 5, 6]
    assert experts[7] == 7


def test_without_drafts_paths_are_stale_and_rows_stay_where_they_are():
    batch, paths = batch_and_paths()
    batch.num_draft_tokens = 0
    pending = SimpleNamespace(routed_experts_gpu=torch.arange(9, dtype=torch.uint8))
    connector = SimpleNamespace(prepare_output=lambda batch: pending)
    follow_paths_in_outputs(connector, paths)
    assert connector.prepare_output(batch).routed_experts_gpu.tolist() == list(range(9))


def test_the_rows_of_some_requests_are_theirs_in_order():
    batch, paths = batch_and_paths()
    batch.cu_num_logits_np = batch.cu_num_logits.numpy()
    batch.idx_mapping = torch.tensor([8, 5, 6])
    batch.input_ids = batch.positions = None
    logits = torch.arange(7.0)[:, None]
    step = VerifiedRows(
        logits, batch, None, paths, torch.arange(3)[:, None], torch.tensor([1, 3, 1])
    )
    part = step.of_requests(np.array([0, 2]))
    assert part.logits.flatten().tolist() == [0, 5, 6]
    assert part.batch.cu_num_logits.tolist() == [0, 1, 3]
    assert part.batch.cu_num_logits.dtype == torch.int32
    assert part.batch.idx_mapping.tolist() == [8, 6]
    assert part.batch.logits_indices.tolist() == [2, 7, 8]
    assert part.paths.nodes[:, 0].tolist() == [0, 0]
    assert part.paths.lengths.tolist() == [0, 0]
    assert part.num_sampled.tolist() == [1, 1]
    assert step.of_requests(np.array([0, 1, 2])) is step
