"""kernels/read_nodes.py and read_roots.py against their references."""

import pytest
import torch

from vllm_treespec.kernels.read_nodes import read_nodes
from vllm_treespec.kernels.read_roots import read_roots
from vllm_treespec.kernels.recycling import NONE
from vllm_treespec.kernels.reference.read_nodes import read_nodes as reference
from vllm_treespec.kernels.reference.read_roots import read_roots as roots_reference


def random_step(counts: list[int], max_num_nodes: int, dtype: torch.dtype):
    """Requests with so many logits each, in a batch that holds other tokens as well;
    the first begins its text."""
    gen = torch.Generator().manual_seed(sum(counts))
    num_reqs, num_logits = len(counts), sum(counts)
    slots = torch.randperm(num_reqs + 3, generator=gen)[:num_reqs]
    cu_num_logits = torch.tensor([0, *counts]).cumsum(0).int()
    places = torch.randperm(3 * num_logits, generator=gen)[:num_logits]
    positions = torch.randint(1, 40, (3 * num_logits,), generator=gen)
    positions[places[0]] = 0
    parents = torch.randint(-1, max_num_nodes, (num_reqs + 3, max_num_nodes + 5))
    paths = torch.zeros(num_reqs, max_num_nodes, dtype=torch.int32)
    lens = torch.zeros(num_reqs, dtype=torch.int32)
    for req, count in enumerate(counts):
        steps = torch.randperm(count - 1, generator=gen)[: count // 2] + 1
        paths[req, 1 : 1 + len(steps)] = steps.sort().values.int()
        paths[req, 1 + len(steps) :] = 99  # stale
        lens[req] = len(steps)
    return (
        slots.to(dtype),
        cu_num_logits,
        places.to(dtype),
        torch.randint(0, 500, (3 * num_logits,), generator=gen).int(),
        positions,
        torch.randint(500, 900, (num_reqs + 3, 60), generator=gen).int()[:, 3:50],
        parents.int()[:, :max_num_nodes],
        torch.randint(1, max_num_nodes, (num_reqs + 3,), generator=gen).int(),
        paths,
        lens,
        torch.randint(0, 500, (num_reqs, max_num_nodes), generator=gen),
    )


@pytest.mark.parametrize("counts", [[1], [1, 1], [8, 1, 5], [33, 2, 33, 17]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_contexts_of_all_nodes(
    counts: list[int], dtype: torch.dtype, device: torch.device
):
    step = random_step(counts, 33, dtype)
    outs = []
    for function in (read_nodes, reference):
        contexts = torch.empty(3, sum(counts), dtype=torch.int64, device=device)
        roots = torch.empty(2, len(counts), dtype=torch.int64, device=device)
        function(*(each.to(device) for each in step), contexts, roots)
        outs.append((contexts, roots))
    for found, expected in zip(*outs, strict=True):
        assert torch.equal(found, expected)
    contexts, roots = outs[0]
    assert roots[0, 0] == NONE and (roots[0, 1:] >= 500).all()
    num_accepted = sum(1 + min(count // 2, count - 1) for count in counts)
    assert (contexts[2] != NONE).sum() == num_accepted


@pytest.mark.parametrize("num_reqs", [1, 3, 32, 50])
def test_the_two_newest_tokens(num_reqs: int, device: torch.device):
    gen = torch.Generator().manual_seed(num_reqs)
    texts = torch.randint(0, 99, (60, 20), generator=gen).int()[:, 2:17]
    lens = torch.randint(0, 16, (60,), generator=gen).int()
    slots = torch.randperm(60, generator=gen)[:num_reqs]
    lens[slots[:3]] = torch.tensor([0, 1, 15]).int()[:num_reqs]
    inputs = [each.to(device) for each in (slots, lens, texts)]
    found = torch.empty(2, num_reqs, dtype=torch.int64, device=device)
    expected = found.clone()
    read_roots(*inputs, found)
    roots_reference(*inputs, expected)
    assert torch.equal(found, expected)
    assert found[:, 0].tolist() == [NONE, NONE]


def test_rejects_batches_longer_than_their_slots(device: torch.device):
    step = [each.to(device) for each in random_step([2], 33, torch.int64)]
    contexts = torch.empty(3, 2, dtype=torch.int64, device=device)
    roots = torch.empty(2, 4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="4 requests"):
        read_nodes(*step, contexts, roots)
    with pytest.raises(ValueError, match="4 rows"):
        read_roots(step[0], step[9], step[5], roots)
