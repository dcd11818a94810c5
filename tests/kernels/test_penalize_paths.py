"""kernels/penalize_paths.py against its reference."""

import pytest
import torch

from vllm_treespec.kernels.penalize_paths import penalize_paths
from vllm_treespec.kernels.reference.penalize_paths import penalize_paths as reference
from vllm_treespec.testing.trees import chain_parents, random_parents

# tokens:      root
#             /    \
#          1: 3    2: 4
#          /         \
#       3: 4         4: 4
#        |
#       5: 3
PARENTS = [-1, 0, 0, 1, 2, 3]
TOKEN_IDS = [0, 3, 4, 4, 4, 3]


def int32(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def pack(prompt_tokens: list[int], vocab_size: int) -> torch.Tensor:
    words = torch.zeros(-(-vocab_size // 32), dtype=torch.int64)
    for token in set(prompt_tokens):
        words[token // 32] |= 1 << (token % 32)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def penalize(
    nodes: list[int],
    device: torch.device,
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    logits: float = 1.0,
) -> list[list[float]]:
    """Logits of 6 tokens at nodes of slot 1's tree; slot 0 has no penalties."""
    rows = torch.full((len(nodes), 6), logits, device=device)
    counts = torch.zeros(2, 6, dtype=torch.int32, device=device)
    for token in output:
        counts[1, token] += 1
    penalize_paths(
        rows,
        int32([1] * len(nodes), device),
        int32(nodes, device),
        int32([[5] * 6, TOKEN_IDS], device),
        int32([[-1, 0, 0, 0, 0, 0], PARENTS], device),
        torch.tensor([1.0, repetition], device=device),
        torch.tensor([0.0, frequency], device=device),
        torch.tensor([0.0, presence], device=device),
        torch.stack([pack([], 6), pack(list(prompt), 6)]).to(device),
        counts,
    )
    return rows.tolist()


@pytest.mark.parametrize("shape", [random_parents, chain_parents])
@pytest.mark.parametrize(("vocab_size", "num_nodes"), [(37, 1), (97, 13), (9001, 70)])
def test_matches_reference(shape, vocab_size, num_nodes, device):
    gen = torch.Generator().manual_seed(num_nodes)
    num_slots, num_rows = 5, 12

    def draw(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=gen, dtype=torch.int32)

    # wider strides than the logits need, few tokens so that paths repeat themselves
    logits = torch.randn(num_rows, vocab_size + 7, generator=gen).to(device)
    logits[2, 3] = float("-inf")
    expected = logits.clone()
    arguments = [
        each.to(device)
        for each in (
            draw(0, num_slots, num_rows),
            draw(0, num_nodes, num_rows),
            draw(0, 9, num_slots, num_nodes),
            shape(num_slots, num_nodes),
            torch.tensor([1.0, 1.3, 0.7, 1.0, 1.1]),
            torch.tensor([0.0, 0.0, 0.4, -0.3, 0.2]),
            torch.tensor([0.0, 0.0, 0.0, 0.9, -0.8]),
            draw(-(2**31), 2**31 - 1, num_slots, -(-vocab_size // 32) + 1),
            draw(0, 2, num_slots, vocab_size + 3),
        )
    ]
    penalize_paths(logits[:, :vocab_size], *arguments)
    reference(expected[:, :vocab_size], *arguments)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    untouched = arguments[0] == 0
    assert (logits[untouched] == expected[untouched]).all()


def test_matches_vllm_on_a_chain(device):
    """Bit by bit: the penalties of an accepted draft are those of decoding it."""
    penalties = pytest.importorskip("vllm.v1.worker.gpu.sample.penalties")
    gen = torch.Generator().manual_seed(0)
    vocab_size, num_nodes = 97, 6
    token_ids = torch.randint(9, (1, num_nodes), generator=gen).int().to(device)
    rows = torch.randn(num_nodes, vocab_size, generator=gen).to(device)
    expected = rows.clone()
    slots = int32([0] * num_nodes, device)
    nodes = torch.arange(num_nodes, dtype=torch.int32, device=device)
    state = (
        torch.tensor([1.7], device=device),
        torch.tensor([0.31], device=device),
        torch.tensor([0.23], device=device),
        pack([1, 4, 8, 31, 32, 96], vocab_size)[None].to(device),
        torch.randint(3, (1, vocab_size), generator=gen).int().to(device),
    )
    parents = chain_parents(1, num_nodes).to(device)
    penalize_paths(rows, slots, nodes, token_ids, parents, *state)
    penalties.apply_penalties(expected, slots, token_ids[0], nodes, *state)
    assert (rows == expected).all()


def test_only_the_way_to_the_root_counts(device):
    """Node 5 is reached by 3, 4, 3; its sibling subtree holds two more fours."""
    (row,) = penalize([5], device, frequency=0.25)
    assert row == [1.0, 1.0, 1.0, 0.5, 0.75, 1.0]


def test_a_node_counts_itself_and_the_root_does_not(device):
    root, node = penalize([0, 2], device, presence=0.5)
    assert root == [1.0] * 6
    assert node == [1.0, 1.0, 1.0, 1.0, 0.5, 1.0]


def test_siblings_and_cousins_with_the_same_token_do_not_add_up(device):
    three, four = penalize([3, 4], device, frequency=0.5)
    assert three == [1.0, 1.0, 1.0, 0.5, 0.5, 1.0]
    assert four == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0]


def test_drafts_add_to_what_was_emitted(device):
    (row,) = penalize([1], device, frequency=0.25, output=(3, 3, 2))
    assert row == [1.0, 1.0, 0.75, 0.25, 1.0, 1.0]


def test_a_draft_repeats_as_a_prompt_token_does(device):
    (row,) = penalize([1], device, repetition=2.0, prompt=(0, 3), output=(5,))
    assert row == [0.5, 1.0, 1.0, 0.5, 1.0, 0.5]
    (row,) = penalize([1], device, repetition=2.0, prompt=(0, 3), logits=-1.0)
    assert row == [-2.0, -1.0, -1.0, -2.0, -1.0, -1.0]


def test_rejects_impossible_shapes(device):
    slots = int32([0, 0], device)
    matrix = int32([[0, 0]], device)
    floats = torch.ones(1, device=device)
    logits = torch.zeros(2, 40, device=device)
    words, counts = int32([[0, 0]], device), int32([[0] * 40], device)

    def call(**changes: torch.Tensor) -> None:
        arguments = {
            "slots": slots,
            "nodes": slots,
            "token_ids": matrix,
            "parents": matrix,
            "repetition": floats,
            "frequency": floats,
            "presence": floats,
            "prompt_masks": words,
            "output_counts": counts,
        }
        penalize_paths(logits, **(arguments | changes))

    with pytest.raises(ValueError, match="must be of one shape"):
        call(parents=words[:, :1])
    with pytest.raises(ValueError, match="shorter than 2 logits rows"):
        call(nodes=slots[:1])
    with pytest.raises(ValueError, match="must cover 40 tokens"):
        call(prompt_masks=words[:, :1])
