"""Schedule: how many nodes may each request spend, and on whose drafts?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_treespec.core.propose import Candidates
from vllm_treespec.core.transfer import pinned


def num_offered(
    candidates: Sequence[Candidates],  # one per proposer on the host
) -> npt.NDArray[np.int32]:  # [num_reqs]
    """Nodes that each row's tree can have at most, known without asking the device.

    Scheduling more would verify padding, so a request that nobody drafted for costs
    what it costs without speculation.
    """
    offered = np.zeros_like(candidates[0].num_candidates)
    for each in candidates:
        offered += each.num_candidates
    return offered


def nodes_by_batch_size(
    num_nodes: int, max_rows: int, max_num_reqs: int
) -> list[tuple[int, int, int]]:
    """How many nodes each request of a batch gets, ranges of (first, last, nodes).

    A forward pass costs the same for one row as for many, until its matrix products
    take longer than reading the weights; from there on every row costs. So the batch's
    requests share ``max_rows`` rows, roots included. There are few tiers, whole
    trees and powers of two: each of them needs CUDA graphs of its own.
    """
    halves = ((num_nodes + 1) // 2).bit_length()
    tiers = [num_nodes + 1, *(1 << power for power in reversed(range(halves)))]
    ranges, first = [], 1
    for rows in tiers:
        last = max_num_reqs if rows == 1 else min(max_rows // rows, max_num_reqs)
        if last >= first:
            ranges.append((first, last, rows - 1))
            first = last + 1
    return ranges


def graphed_batches(first: int, last: int) -> list[int]:
    """Batch sizes with CUDA graphs, so that each of these batches fits into one.

    A batch is padded to the next of them, by an eighth at most: each graph takes memory.
    """
    sizes = set()
    for num_reqs in range(first, last + 1):
        step = 1 << max(0, num_reqs.bit_length() - 4)  # eight to every power of two
        sizes.add(min(last, -(-num_reqs // step) * step))
    return sorted(sizes)


class RequestLimits:
    """What every request slot asked for."""

    def __init__(
        self, max_num_reqs: int, num_proposers: int, device: torch.device
    ) -> None:
        self.max_nodes_np = np.zeros(max_num_reqs, np.int32)
        self.allowed = np.zeros((num_proposers, max_num_reqs), np.bool_)
        # The first on the device.
        self.max_nodes = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)

    def set(self, slot: int, max_nodes: int, allowed: Sequence[bool]) -> None:
        """A request came. Who may verify nothing needs no drafts."""
        self.max_nodes_np[slot] = max_nodes
        self.allowed[:, slot] = [each and max_nodes > 0 for each in allowed]
        self.max_nodes[slot].fill_(max_nodes)


def drop_unwanted(
    num_candidates: torch.Tensor,  # [num_proposers, num_reqs] int32, in place
    allowed: npt.NDArray[np.bool_],  # the same shape
) -> None:
    """Leave nothing of proposers that a request does not want."""
    factors = pinned(allowed.astype(np.int32), num_candidates.device)
    num_candidates *= factors.to(num_candidates.device, non_blocking=True)
