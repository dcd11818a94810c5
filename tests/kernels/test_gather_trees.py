"""kernels/gather_trees.py against its reference."""

from dataclasses import astuple, dataclass

import pytest
import torch

from vllm_treespec.kernels.gather_trees import gather_trees
from vllm_treespec.kernels.reference.ancestor_mask import ancestor_mask
from vllm_treespec.kernels.reference.gather_trees import gather_trees as reference
from vllm_treespec.testing.trees import random_parents

STALE = -7
MAX_NUM_ROWS = 5


@dataclass
class Batch:
    """gather_trees' arguments, in order."""

    slots: torch.Tensor
    cu_num_logits: torch.Tensor
    query_start_loc: torch.Tensor
    num_nodes: torch.Tensor
    depths: torch.Tensor
    masks: torch.Tensor
    positions: torch.Tensor
    row_num_nodes: torch.Tensor
    row_depths: torch.Tensor
    row_masks: torch.Tensor
    root_positions: torch.Tensor

    def gather(self) -> None:
        gather_trees(*vars(self).values())


def int32(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def make_batch(
    slots: list[int],
    num_row_nodes: list[int],
    num_prompt_tokens: list[int],  # query tokens of a row before its root
    parents: torch.Tensor,  # [max_num_reqs, max_num_nodes]
    num_nodes: list[int],
    device: torch.device,
) -> Batch:
    """Trees as ``ancestor_mask`` leaves them; row r starts at position 100 (r + 1)."""
    shape = parents.shape
    num_words = -(-shape[1] // 32)
    depths = torch.full(shape, STALE, dtype=torch.int32)
    masks = torch.full((*shape, num_words), STALE, dtype=torch.int32)
    sizes = torch.tensor(num_nodes, dtype=torch.int32)
    ancestor_mask(torch.arange(shape[0]), parents, sizes, depths, masks)

    num_query = [n + p for n, p in zip(num_row_nodes, num_prompt_tokens, strict=True)]
    positions = [
        100 * (row + 1) + offset
        for row, num in enumerate(num_query)
        for offset in range(num)
    ]
    rows = torch.full((MAX_NUM_ROWS,), STALE, dtype=torch.int32)
    row_depths = torch.full((MAX_NUM_ROWS, shape[1]), STALE, dtype=torch.int32)
    batch = Batch(
        slots=torch.tensor(slots, dtype=torch.int32),
        cu_num_logits=prefix_sums(num_row_nodes),
        query_start_loc=prefix_sums(num_query),
        num_nodes=sizes,
        depths=depths,
        masks=masks,
        positions=torch.tensor(positions, dtype=torch.int64),
        row_num_nodes=rows,
        row_depths=row_depths,
        row_masks=row_depths[:, :, None].repeat(1, 1, num_words),
        root_positions=rows.clone(),
    )
    return Batch(*(tensor.to(device) for tensor in vars(batch).values()))


def prefix_sums(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def drawn_batch(
    num_row_nodes: int, num_nodes: int, device: torch.device, num_prompt_tokens: int = 0
) -> Batch:
    """Row 0 carries slot 2's tree.

        0
       / \\
      1   2
     /   / \\
    3   4   5
    """
    parents = torch.tensor([[-1] * 6, [-1] * 6, [-1, 0, 0, 1, 2, 2]], dtype=torch.int32)
    sizes = [1, 1, num_nodes]
    return make_batch([2], [num_row_nodes], [num_prompt_tokens], parents, sizes, device)


@pytest.mark.parametrize("max_num_nodes", [1, 2, 7, 32, 33, 65, 200])
def test_matches_reference(max_num_nodes: int, device: torch.device):
    half = max_num_nodes // 2
    batch = make_batch(
        slots=[4, 0, 5, 2],
        num_row_nodes=[max_num_nodes, 0, half, max_num_nodes],
        num_prompt_tokens=[0, 3, 1, 2],
        parents=random_parents(6, max_num_nodes),
        num_nodes=[max_num_nodes, 1, half + 1, 1, max_num_nodes, max_num_nodes],
        device=device,
    )
    expected = Batch(*(tensor.clone() for tensor in vars(batch).values()))
    batch.gather()
    reference(*vars(expected).values())
    torch.testing.assert_close(astuple(batch), astuple(expected), rtol=0, atol=0)


def test_nodes_of_one_depth_share_a_position(device: torch.device):
    batch = drawn_batch(6, 6, device)
    batch.gather()
    assert batch.positions.tolist() == [100, 101, 101, 102, 102, 102]
    assert batch.root_positions[0] == 100
    assert batch.row_num_nodes[0] == 6
    assert batch.row_depths[0].tolist() == [0, 1, 1, 2, 2, 2]
    assert batch.row_masks[0].flatten().tolist() == [
        0b000001,
        0b000011,
        0b000101,
        0b001011,
        0b010101,
        0b100101,
    ]


def test_tokens_before_the_root_keep_their_positions(device: torch.device):
    batch = drawn_batch(6, 6, device, num_prompt_tokens=2)
    batch.gather()
    assert batch.positions.tolist() == [100, 101, 102, 103, 103, 104, 104, 104]
    assert batch.root_positions[0] == 102


def test_a_truncated_tree_is_its_first_nodes(device: torch.device):
    batch = drawn_batch(4, 6, device)
    batch.gather()
    assert batch.positions.tolist() == [100, 101, 101, 102]
    assert batch.row_num_nodes[0] == 4
    assert batch.row_depths[0].tolist() == [0, 1, 1, 2, STALE, STALE]
    assert batch.row_masks[0, 4:].flatten().tolist() == [STALE, STALE]


def test_placeholders_see_the_root_and_themselves(device: torch.device):
    # what was never built hangs from the root:  0 -- 1, 2 (built), 3, 4, 5
    batch = drawn_batch(6, 3, device)
    batch.gather()
    assert batch.positions.tolist() == [100, 101, 101, 101, 101, 101]
    assert batch.row_depths[0].tolist() == [0, 1, 1, 1, 1, 1]
    assert batch.row_masks[0, 3:].flatten().tolist() == [0b1001, 0b10001, 0b100001]


def test_the_root_needs_no_tree(device: torch.device):
    batch = drawn_batch(2, 1, device)
    batch.depths.fill_(STALE)
    batch.masks.fill_(STALE)
    batch.gather()
    assert batch.row_depths[0, :2].tolist() == [0, 1]
    assert batch.row_masks[0, :2].flatten().tolist() == [0b01, 0b11]
    assert batch.positions.tolist() == [100, 101]


def test_placeholders_past_a_word_see_the_root_in_the_first(device: torch.device):
    batch = make_batch([0], [66], [0], random_parents(1, 66), [1], device)
    batch.gather()
    masks = batch.row_masks[0]
    assert masks[31].tolist() == [1 - (1 << 31), 0, 0]
    assert masks[32].tolist() == [1, 1, 0]
    assert masks[65].tolist() == [1, 0, 2]


def test_a_row_without_logits_ends_at_its_last_token(device: torch.device):
    batch = drawn_batch(0, 6, device, num_prompt_tokens=3)
    batch.gather()
    assert batch.positions.tolist() == [100, 101, 102]
    assert batch.root_positions[0] == 102
    assert batch.row_num_nodes[0] == 0
    assert (batch.row_depths == STALE).all() and (batch.row_masks == STALE).all()


def test_rows_that_pad_the_batch_have_no_nodes(device: torch.device):
    batch = drawn_batch(6, 6, device)
    batch.gather()
    assert batch.row_num_nodes.tolist() == [6] + [0] * (MAX_NUM_ROWS - 1)


def test_an_empty_batch_clears_every_row(device: torch.device):
    batch = make_batch([], [], [], random_parents(2, 4), [4, 4], device)
    batch.positions = torch.zeros(4, dtype=torch.int64, device=device)
    batch.gather()
    assert batch.row_num_nodes.tolist() == [0] * MAX_NUM_ROWS


def test_reads_and_writes_views_of_wider_buffers(device: torch.device):
    batch = make_batch([1, 0], [7, 5], [1, 0], random_parents(2, 7), [4, 7], device)
    expected = Batch(*(tensor.clone() for tensor in vars(batch).values()))
    reference(*vars(expected).values())
    # a stride of its own for every buffer
    for extra, name in enumerate(("depths", "masks", "row_depths", "row_masks"), 1):
        tensor = getattr(batch, name)
        shape = (len(tensor), *(size + extra for size in tensor.shape[1:]))
        wide = torch.full(shape, STALE, dtype=torch.int32, device=device)
        view = wide[:, :7, :1] if wide.ndim == 3 else wide[:, :7]
        setattr(batch, name, view.copy_(tensor))
    batch.gather()
    torch.testing.assert_close(astuple(batch), astuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_num_nodes": (0,)}, "room for 0 rows, got 1"),
        ({"cu_num_logits": (1,)}, "1 requests need 2 prefix sums"),
        ({"row_depths": (MAX_NUM_ROWS, 5)}, r"row_depths \(5, 5\), expected 5 rows of"),
        ({"masks": (3, 6, 0)}, r"masks \(3, 6, 0\) cannot hold 6 nodes"),
        ({"row_masks": (MAX_NUM_ROWS, 6, 2)}, "expected a mask of 1 words"),
    ],
)
def test_rejects_impossible_shapes(
    changes: dict[str, tuple[int, ...]], message: str, device: torch.device
):
    batch = drawn_batch(6, 6, device)
    for name, shape in changes.items():
        setattr(batch, name, torch.zeros(shape, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match=message):
        batch.gather()
