"""Per-node rows where vLLM thinks of one row per request, or per token of a chain.

A request in a batch has a row of logits for every node of its tree. What vLLM maps to
requests is mapped to rows here, and what it returns beside each token is taken from the
rows of the accepted path instead of the first ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.worker.gpu.lora_utils import LoraState

from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths


class NodeAdapters(LoraState):
    """vLLM's map from requests to adapters, one entry for each row of logits.

    vLLM's own has one for each request, and adapters that reach the logits (``lm_head``)
    would change those of the first few nodes only.
    """

    # [num_reqs] of the batch that is about to be mapped
    num_logits: npt.NDArray[np.int32]

    def make_lora_inputs(
        self,
        req_ids: list[str],
        idx_mapping: np.ndarray,
        num_scheduled_tokens: np.ndarray,
    ) -> tuple[tuple[int, ...], tuple[int, ...], set[Any]]:
        of_requests, of_tokens, active = super().make_lora_inputs(
            req_ids, idx_mapping, num_scheduled_tokens
        )
        return tuple(np.repeat(of_requests, self.num_logits)), of_tokens, active


class VerifiedRows(NamedTuple):
    """A verified step, as proposers learn from it."""

    logits: torch.Tensor  # [num_logits, vocab_size], one row per node
    batch: Any  # vLLM's InputBatch, or what is read of one
    trees: TreeBuffers
    paths: AcceptedPaths
    sampled: torch.Tensor  # [num_reqs, max_num_nodes] int64
    num_sampled: torch.Tensor  # [num_reqs] int32

    def of_requests(self, rows: npt.NDArray[np.intp]) -> VerifiedRows:
        """The same with these batch rows alone."""
        batch, device = self.batch, self.logits.device
        if len(rows) == batch.num_reqs:
            return self
        starts = batch.cu_num_logits_np[rows]
        counts = batch.cu_num_logits_np[rows + 1] - starts
        ends = np.cumsum(counts)
        places = np.arange(counts.sum()) - np.repeat(ends - counts - starts, counts)
        nodes = torch.from_numpy(places).to(device)
        requests = torch.from_numpy(rows).to(device)
        cu_num_logits = torch.from_numpy(np.r_[0, ends]).to(batch.cu_num_logits)
        return VerifiedRows(
            self.logits[nodes],
            SimpleNamespace(
                num_reqs=len(rows),
                idx_mapping=batch.idx_mapping[requests],
                cu_num_logits=cu_num_logits,
                logits_indices=batch.logits_indices[nodes],
                input_ids=batch.input_ids,
                positions=batch.positions,
            ),
            self.trees,
            AcceptedPaths(self.paths.nodes[requests], self.paths.lengths[requests]),
            self.sampled[requests],
            self.num_sampled[requests],
        )


def path_rows(batch: Any, paths: AcceptedPaths) -> tuple[torch.Tensor, torch.Tensor]:
    """For every row of logits, ``[num_logits]`` int64 each: its batch row, and the row
    of logits of the node that lies as many steps down the request's accepted path as
    this row lies behind the root's; the root's where the path is shorter."""
    cu_num_logits = batch.cu_num_logits.long()
    steps = batch.expanded_local_pos.long()
    batch_rows = torch.repeat_interleave(
        cu_num_logits.diff(), output_size=steps.shape[0]
    )
    on_path = steps <= paths.lengths[batch_rows]
    nodes = torch.where(on_path, paths.nodes[batch_rows, steps], 0)
    return batch_rows, cu_num_logits[batch_rows] + nodes


def sum_on_paths(
    counts: torch.Tensor,  # [num_logits] int32, of every node
    batch: Any,
    paths: AcceptedPaths,
) -> torch.Tensor:  # [num_reqs] int32
    """What the nodes of each request's accepted path come to, the root included."""
    batch_rows, rows = path_rows(batch, paths)
    on_path = batch.expanded_local_pos <= paths.lengths[batch_rows]
    sums = torch.zeros(batch.num_reqs, dtype=counts.dtype, device=counts.device)
    return sums.index_add_(0, batch_rows, torch.where(on_path, counts[rows], 0))


def follow_paths_in_outputs(connector: Any, paths: AcceptedPaths) -> None:
    """Have routed experts that are returned with each token be those of its own row.

    vLLM keeps the first rows of each request, as many as tokens were accepted.
    """
    prepare = connector.prepare_output

    def prepare_output(batch: Any) -> Any:
        pending = prepare(batch)
        if pending is not None and batch.num_draft_tokens:
            rows = batch.logits_indices.long()
            experts = pending.routed_experts_gpu.clone()
            experts[rows] = pending.routed_experts_gpu[rows[path_rows(batch, paths)[1]]]
            pending.routed_experts_gpu = experts
        return pending

    connector.prepare_output = prepare_output
