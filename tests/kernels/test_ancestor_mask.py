"""kernels/ancestor_mask.py against its reference."""

import pytest
import torch

from vllm_treespec.kernels.ancestor_mask import ancestor_mask
from vllm_treespec.kernels.reference.ancestor_mask import ancestor_mask as reference
from vllm_treespec.testing.trees import chain_parents, random_parents

STALE = -7
MAX_NUM_REQS = 6


def int32(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def stale(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.full(shape, STALE, dtype=torch.int32, device=device)


def check(slots: torch.Tensor, parents: torch.Tensor, num_nodes: torch.Tensor) -> None:
    max_num_reqs, max_num_nodes = parents.shape
    num_words = -(-max_num_nodes // 32)
    results = []
    for fn in (ancestor_mask, reference):
        depths = stale(max_num_reqs, max_num_nodes, device=parents.device)
        masks = stale(max_num_reqs, max_num_nodes, num_words, device=parents.device)
        fn(slots, parents, num_nodes, depths, masks)
        results.append((depths, masks))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("max_num_nodes", [1, 2, 7, 32, 33, 65, 200])
def test_matches_reference(max_num_nodes: int, device: torch.device):
    parents = random_parents(MAX_NUM_REQS, max_num_nodes).to(device)
    gen = torch.Generator().manual_seed(0)
    num_nodes = torch.randint(1, max_num_nodes + 1, (MAX_NUM_REQS,), generator=gen)
    num_nodes[4] = max_num_nodes
    check(int32([4, 0, 5], device), parents, num_nodes.int().to(device))


def test_matches_reference_on_a_tree_of_a_thousand_nodes(device: torch.device):
    parents = random_parents(2, 1025).to(device)
    check(int32([1], device), parents, int32([1, 1025], device))


def test_matches_reference_on_chains(device: torch.device):
    parents = chain_parents(2, 100).to(device)
    check(int32([1, 0], device), parents, int32([100, 70], device))


def test_siblings_do_not_see_each_other(device: torch.device):
    #   0
    #  / \
    # 1   2
    # |
    # 3
    parents = int32([[-1, 0, 0, 1]], device)
    depths, masks = stale(1, 4, device=device), stale(1, 4, 1, device=device)
    ancestor_mask(int32([0], device), parents, int32([4], device), depths, masks)
    assert depths.tolist() == [[0, 1, 1, 2]]
    assert masks.flatten().tolist() == [0b0001, 0b0011, 0b0101, 0b1011]


def test_node_31_is_the_sign_bit_and_node_32_opens_the_next_word(device: torch.device):
    # 0 -- 31 -- 32 -- 33, and thirty leaves
    parents = int32([[-1] + [0] * 31 + [31, 32]], device)
    depths, masks = stale(1, 34, device=device), stale(1, 34, 2, device=device)
    ancestor_mask(int32([0], device), parents, int32([34], device), depths, masks)
    sign = -(1 << 31)
    assert masks[0, 30:].tolist() == [
        [1 << 30 | 1, 0],
        [sign | 1, 0],
        [sign | 1, 0b01],
        [sign | 1, 0b11],
    ]
    assert depths[0, 30:].tolist() == [1, 1, 2, 3]


def test_words_beyond_the_tree_are_cleared(device: torch.device):
    parents = int32([[-1, 0]], device)
    depths, masks = stale(1, 2, device=device), stale(1, 2, 3, device=device)
    ancestor_mask(int32([0], device), parents, int32([2], device), depths, masks)
    assert masks.tolist() == [[[0b01, 0, 0], [0b11, 0, 0]]]


def test_other_slots_and_columns_past_the_tree_are_left_alone(device: torch.device):
    parents = random_parents(3, 8).to(device)
    depths, masks = stale(3, 8, device=device), stale(3, 8, 1, device=device)
    num_nodes = int32([8, 5, 8], device)
    ancestor_mask(int32([1], device), parents, num_nodes, depths, masks)
    for out in (depths, masks):
        assert (out[[0, 2]] == STALE).all()
        assert (out[1, 5:] == STALE).all()
        assert (out[1, :5] != STALE).all()


def test_reads_and_writes_views_of_wider_buffers(device: torch.device):
    parents = random_parents(3, 100).to(device)[:, :40]
    depths = stale(3, 64, device=device)
    masks = stale(3, 50, 4, device=device)
    slots, num_nodes = int32([2, 0], device), int32([40, 40, 39], device)
    expected_depths, expected_masks = depths.clone(), masks.clone()
    ancestor_mask(slots, parents, num_nodes, depths[:, :40], masks[:, :40, :2])
    reference(
        slots, parents, num_nodes, expected_depths[:, :40], expected_masks[:, :40, :2]
    )
    assert torch.equal(depths, expected_depths)
    assert torch.equal(masks, expected_masks)


def test_no_requests_are_no_work(device: torch.device):
    parents = random_parents(2, 4).to(device)
    check(int32([], device), parents, int32([4, 4], device))


def test_rejects_masks_that_are_too_narrow(device: torch.device):
    parents = random_parents(1, 33).to(device)
    depths, masks = stale(1, 33, device=device), stale(1, 33, 1, device=device)
    with pytest.raises(ValueError, match="1 mask words hold 32 nodes, got 33"):
        ancestor_mask(int32([0], device), parents, int32([33], device), depths, masks)


def test_rejects_outputs_of_another_shape(device: torch.device):
    parents = random_parents(2, 8).to(device)
    depths, masks = stale(2, 7, device=device), stale(2, 8, 1, device=device)
    with pytest.raises(ValueError, match=r"depths \(2, 7\).*parents \(2, 8\)"):
        ancestor_mask(int32([0], device), parents, int32([8, 8], device), depths, masks)


def test_rejects_transposed_trees(device: torch.device):
    parents = random_parents(4, 4).to(device).T
    depths, masks = stale(4, 4, device=device), stale(4, 4, 1, device=device)
    with pytest.raises(ValueError, match="last dimension"):
        ancestor_mask(
            int32([0], device), parents, int32([4] * 4, device), depths, masks
        )
