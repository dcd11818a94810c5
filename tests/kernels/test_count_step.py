"""kernels/count_step.py against its reference; what it counts: tests/core/test_observe.py."""

from typing import NamedTuple

import pytest
import torch

from vllm_treespec.kernels.bins import NUM_RANKS
from vllm_treespec.kernels.count_step import count_step
from vllm_treespec.kernels.reference.count_step import count_step as reference
from vllm_treespec.testing.trees import random_parents

STALE = -7
MAX_NUM_REQS = 9
SLOTS = [5, 0, 7, 2, 8]


class Inputs(NamedTuple):
    slots: torch.Tensor
    cu_num_logits: torch.Tensor
    num_nodes: torch.Tensor
    parents: torch.Tensor
    proposers: torch.Tensor
    paths: torch.Tensor
    path_lens: torch.Tensor


def empty_counts(num_proposers: int, inputs: Inputs) -> torch.Tensor:
    shape = (len(inputs.slots), 2 + NUM_RANKS + 3 * num_proposers)
    return torch.full(shape, STALE, dtype=torch.int64, device=inputs.slots.device)


def random_inputs(
    max_num_nodes: int, num_proposers: int, device: torch.device, *, flat: bool = False
) -> Inputs:
    """Stale columns hold the best children and paths out of bounds."""
    gen = torch.Generator().manual_seed(max_num_nodes)

    def randint(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=gen, dtype=torch.int32)

    shape = (MAX_NUM_REQS, max_num_nodes)
    parents = random_parents(*shape)
    if flat:
        parents[:, 1:] = 0
    num_nodes = 1 + randint(max_num_nodes, MAX_NUM_REQS)
    num_nodes[5] = max_num_nodes
    scheduled = randint(max_num_nodes + 1, len(SLOTS))
    scheduled[0], scheduled[1] = max_num_nodes, 0
    parents[torch.arange(max_num_nodes) >= num_nodes[:, None]] = 0
    paths = torch.full((len(SLOTS) + 1, max_num_nodes), 1 << 30).int()
    path_lens = torch.zeros(len(SLOTS) + 1).int()
    for row, slot in enumerate(SLOTS):
        num_verified = min(int(scheduled[row]), int(num_nodes[slot]))
        path = [0]
        while children := [
            node for node in range(1, num_verified) if parents[slot, node] == path[-1]
        ]:
            path.append(children[int(randint(len(children), 1))])
        paths[row, : len(path)] = torch.tensor(path)
        path_lens[row] = len(path) - 1
    cu_num_logits = torch.zeros(len(SLOTS) + 1).int()
    cu_num_logits[1:] = scheduled.cumsum(0)
    inputs = Inputs(
        torch.tensor(SLOTS),
        cu_num_logits,
        num_nodes,
        parents,
        1 + randint((1 << num_proposers) - 1, *shape),
        paths,
        path_lens,
    )
    return Inputs(*(tensor.to(device) for tensor in inputs))


def check(num_proposers: int, inputs: Inputs) -> torch.Tensor:
    counts, expected = (empty_counts(num_proposers, inputs) for _ in range(2))
    count_step(*inputs, counts)
    reference(*inputs, expected)
    assert torch.equal(counts, expected)
    return counts


@pytest.mark.parametrize("num_proposers", [1, 3])
@pytest.mark.parametrize("max_num_nodes", [1, 2, 9, 33, 65, 200])
def test_matches_reference(
    max_num_nodes: int, num_proposers: int, device: torch.device
):
    check(num_proposers, random_inputs(max_num_nodes, num_proposers, device))


def test_matches_reference_at_full_size(device: torch.device):
    check(2, random_inputs(1025, 2, device))


def test_ranks_past_the_last_are_counted_together(device: torch.device):
    inputs = random_inputs(33, 2, device, flat=True)
    inputs.paths[0, 1] = 32
    counts = check(2, inputs)
    assert counts[0, NUM_RANKS] == 1
    assert counts[0, 1 : 1 + NUM_RANKS].sum() == 1


def test_reads_and_writes_views_of_wider_buffers(device: torch.device):
    narrow = random_inputs(33, 2, device)
    trees = [torch.zeros(2 * MAX_NUM_REQS, 40, device=device).int() for _ in range(2)]
    inputs = narrow._replace(
        parents=trees[0][::2, 3:36],
        proposers=trees[1][::2, 3:36],
        paths=torch.zeros(12, 50, device=device).int()[::2, 5:38],
    )
    for view, tensor in zip(inputs, narrow, strict=True):
        view.copy_(tensor.clone())
    check(2, inputs)
    buffer = empty_counts(5, inputs)
    expected = empty_counts(2, inputs)
    count_step(*inputs, buffer[:, 3:20])
    reference(*inputs, expected)
    assert torch.equal(buffer[:, 3:20], expected)
    assert (buffer[:, :3] == STALE).all() and (buffer[:, 20:] == STALE).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proposers": torch.zeros(9, 8).int()}, "one shape and one stride"),
        ({"cu_num_logits": torch.zeros(5).int()}, "5 requests need 6 prefix sums"),
        ({"paths": torch.zeros(4, 7).int()}, "shorter than 5 rows"),
    ],
)
def test_rejects_shapes_that_do_not_fit(
    changes: dict[str, torch.Tensor], message: str, device: torch.device
):
    inputs = random_inputs(7, 2, device)
    changes = {name: tensor.to(device) for name, tensor in changes.items()}
    with pytest.raises(ValueError, match=message):
        count_step(*inputs._replace(**changes), empty_counts(2, inputs))


def test_rejects_counts_of_no_number_of_proposers(device: torch.device):
    inputs = random_inputs(7, 2, device)
    with pytest.raises(ValueError, match="11 columns and 3 for each proposer"):
        count_step(*inputs, empty_counts(2, inputs)[:, :-1])
