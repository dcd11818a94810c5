"""kernels/grow_paths.py, learn_rates.py and fit_rates.py against their references."""

import pytest
import torch

from vllm_treespec.kernels.fit_rates import fit_rates
from vllm_treespec.kernels.grow_paths import grow_paths, num_places
from vllm_treespec.kernels.learn_rates import learn_rates
from vllm_treespec.kernels.recycling import BIN_WIDTH, MEMORY, NONE, NUM_BINS
from vllm_treespec.kernels.reference.blend_successors import blend_successors
from vllm_treespec.kernels.reference.fit_rates import fit_rates as fit_reference
from vllm_treespec.kernels.reference.grow_paths import grow_paths as reference
from vllm_treespec.kernels.reference.learn_rates import learn_rates as learn_reference
from vllm_treespec.kernels.reference.successors import rows_of
from vllm_treespec.testing.recycled import (
    VOCAB_SIZE,
    Table,
    empty_table,
    random_contexts,
    random_successors,
)

STALE = -7


def taught_table(k: int, device: torch.device, num: int = 60) -> Table:
    gen, table = torch.Generator().manual_seed(k), empty_table(k, torch.device("cpu"))
    for _ in range(3):
        contexts = random_contexts(num, gen)
        rows = rows_of(*contexts, VOCAB_SIZE, table.owners.shape[0])
        keys = ((rows << 32) | torch.arange(num)).flatten().sort()
        learned = random_successors(num, min(k, 6), gen)
        blend_successors(*keys, *contexts, *learned, VOCAB_SIZE, *table, 4)
    return Table(*(each.to(device) for each in table))


def knots_of(device: torch.device) -> torch.Tensor:
    """Falling, and not alike for tokens and for pairs."""
    centres = -BIN_WIDTH * (torch.arange(NUM_BINS) + 0.5)
    return torch.stack([centres, 0.7 * centres - 0.1]).to(device)


def grow(kernel, table, contexts, active, depth, max_nodes, rows=8):
    device, inputs = table.owners.device, (*contexts, active)
    width = num_places(depth, max_nodes)
    found = torch.full((rows, width), STALE, dtype=torch.int32, device=device)
    outs = [
        torch.full((rows, max_nodes), STALE, dtype=dtype, device=device)
        for dtype in (torch.int32, torch.int32, torch.float32)
    ]
    out_num = torch.full((rows,), STALE, dtype=torch.int32, device=device)
    kernel(
        *(each.to(device) for each in inputs),
        VOCAB_SIZE,
        *table,
        knots_of(device),
        depth,
        found,
        *outs,
        out_num,
    )
    return *outs, out_num


@pytest.mark.parametrize(("k", "max_nodes"), [(1, 4), (3, 1), (3, 9), (16, 62)])
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_matches_reference(k: int, max_nodes: int, depth: int, device: torch.device):
    table = taught_table(k, device)
    contexts = random_contexts(7, torch.Generator().manual_seed(depth))
    active = torch.tensor([1, 2, 0, 1, 1, 1, 1], dtype=torch.int32)
    found = grow(grow_paths, table, contexts, active, depth, max_nodes)
    expected = grow(reference, table, contexts, active, depth, max_nodes)
    assert torch.equal(found[3], expected[3])
    for each, other in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(each, other)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)
    counts = found[3].tolist()
    assert counts[2] == 0 and counts[7] == STALE and max(counts) > 0


def test_an_empty_table_and_requests_that_said_nothing_have_no_paths(
    device: torch.device,
):
    contexts = (torch.tensor([3, 4]), torch.tensor([5, NONE]))
    table = empty_table(4, device)
    *_, counts = grow(grow_paths, table, contexts, torch.tensor([True, True]), 3, 5)
    assert counts[:2].tolist() == [0, 0]


@pytest.mark.parametrize("num_reqs", [1, 6])
@pytest.mark.parametrize("width", [1, 4, 12])
def test_counts_what_was_right(num_reqs: int, width: int, device: torch.device):
    table, gen = taught_table(5, device), torch.Generator().manual_seed(width)
    before, token_ids = random_contexts(num_reqs, gen)
    said = torch.empty(num_reqs, width + 3, dtype=torch.int64)[:, 1 : 1 + width]
    # mostly what the table says, so that some go on
    for req in range(num_reqs):
        token = int(token_ids[req])
        for step in range(width):
            known = table.token_ids[min(max(token, 0), VOCAB_SIZE - 1), step % 2]
            token = int(known) if step != 5 else 3
            said[req, step] = max(token, 0)
    counts = torch.arange(num_reqs).remainder(width + 1).int()
    counts[0] = width
    results = []
    for function in (learn_rates, learn_reference):
        rates = torch.zeros(2, 2, NUM_BINS, device=device)
        inputs = (each.to(device) for each in (before, token_ids, said, counts))
        function(*inputs, VOCAB_SIZE, *table, 8, *rates)
        results.append(rates)
    assert torch.equal(*results) or (results[0].sum(2) == results[1].sum(2)).all()
    torch.testing.assert_close(results[0].sum(2), results[1].sum(2))
    assert (results[0][0] <= results[0][1]).all()


@pytest.mark.parametrize("most", [0, 50, 3 * MEMORY])
def test_fits_rates_that_never_rise(most: float, device: torch.device):
    gen = torch.Generator().manual_seed(1)
    known = (most * torch.rand(2, NUM_BINS, generator=gen)).round()
    right = (known * torch.rand(2, NUM_BINS, generator=gen)).round()
    results = []
    for function in (fit_rates, fit_reference):
        counts = [right.to(device), known.to(device)]
        counts = [each.clone() for each in counts]
        knots = torch.empty(2, NUM_BINS, device=device)
        function(*counts, knots)
        results.append([*counts, knots])
    # sums of tiny priors, taken in another order
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert (results[0][2].diff() <= 0).all() and (results[0][1] <= MEMORY).all()


def test_rejects_what_does_not_fit(device: torch.device):
    table, token = empty_table(3, device), torch.zeros(1).long().to(device)
    knots, out = knots_of(device), torch.zeros(1, 4, device=device)
    with pytest.raises(ValueError, match=r"expected 1 rows of 24"):
        grow_paths(token, token, token, 9, *table, knots, 2, out, out, out, out, token)
    with pytest.raises(ValueError, match="expected contiguous rows of 48"):
        fit_rates(out, out, out)
    with pytest.raises(ValueError, match="as many rows emitted"):
        learn_rates(token, token, token[:0, None], token, 9, *table, 2, knots, knots)
