"""kernels/ban_words.py against its reference."""

import pytest
import torch

from vllm_treespec.kernels.ban_words import ban_words
from vllm_treespec.kernels.reference.ban_words import ban_words as reference
from vllm_treespec.testing.trees import chain_parents, random_parents

VOCAB_SIZE = 12
# prompt 9 8, output 7 6, the 6 being the root:
#             6
#          /    \
#       1: 3    2: 4
#        |        |
#       3: 4     4: 5
#        |
#       5: 5
PARENTS = [-1, 0, 0, 1, 2, 3]
TOKEN_IDS = [0, 3, 4, 4, 5, 5]
SEQUENCE = [9, 8, 7, 6, 0, 0]
PROMPT_LEN, TOTAL_LEN = 2, 4


def int32(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def banned(words: list[list[int]], node: int, device: torch.device) -> list[int]:
    """Tokens ruled out at a node of slot 1's tree; slot 0 bans token 0."""
    logits = torch.zeros(1, VOCAB_SIZE, device=device)
    flat = [token for word in words for token in word]
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word))
    padding = [-1] * 3
    ban_words(
        logits,
        int32([1], device),
        int32([node], device),
        int32([[1] * 6, TOKEN_IDS], device),
        int32([[-1, 0, 0, 0, 0, 0], PARENTS], device),
        int32([[0] * (len(flat) + 3), flat + padding], device),
        int32([[0, 1] + [1] * (len(starts) + 1), starts + padding], device),
        int32([1, len(words)], device),
        int32([[1] * 6, SEQUENCE], device),
        int32([1, PROMPT_LEN], device),
        int32([4, TOTAL_LEN], device),
        len(words) + 1,
    )
    return (logits[0] == float("-inf")).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("shape", [random_parents, chain_parents])
@pytest.mark.parametrize("num_nodes", [1, 2, 13, 40])
def test_matches_reference(shape, num_nodes, device):
    gen = torch.Generator().manual_seed(num_nodes)
    num_slots, num_rows, max_num_words, max_len = 5, 14, 6, 20

    def draw(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=gen, dtype=torch.int32)

    # two tokens only, so that long words often match
    sizes = draw(1, 5, num_slots, max_num_words)
    starts = torch.zeros(num_slots, max_num_words + 1, dtype=torch.int32)
    starts[:, 1:] = sizes.cumsum(1)
    prompt_lens = draw(0, 4, num_slots)
    arguments = [
        each.to(device)
        for each in (
            draw(0, num_slots, num_rows),
            draw(0, num_nodes, num_rows),
            draw(0, 2, num_slots, num_nodes),
            shape(num_slots, num_nodes),
            draw(0, 2, num_slots, 5 * max_num_words),
            starts,
            int32([0, 1, max_num_words, 3, max_num_words], torch.device("cpu")),
            draw(0, 2, num_slots, max_len),
            prompt_lens,
            prompt_lens + draw(1, 6, num_slots),
        )
    ]
    logits = torch.randn(num_rows, VOCAB_SIZE + 3, generator=gen).to(device)
    expected = logits.clone()
    ban_words(logits[:, :VOCAB_SIZE], *arguments, max_num_words)
    reference(expected[:, :VOCAB_SIZE], *arguments, max_num_words)
    assert torch.equal(logits, expected)
    assert logits.isinf().any()


def test_a_word_of_one_token_is_banned_everywhere(device):
    assert [banned([[2]], node, device) for node in range(6)] == [[2]] * 6


def test_a_word_is_banned_where_its_path_has_begun_it(device):
    words = [[4, 5, 1]]
    assert [banned(words, node, device) for node in range(6)] == [
        *([],) * 4,
        [1],
        [1],
    ]


def test_siblings_and_cousins_begin_nothing(device):
    """Rows 2, 3 and 3, 4 are neighbours but not on one path."""
    assert banned([[4, 4, 1], [3, 4, 4, 1]], 3, device) == []
    assert banned([[4, 5, 1], [3, 4, 2]], 3, device) == [2]


def test_a_word_goes_on_from_the_output_into_the_tree(device):
    assert banned([[7, 6, 3, 4, 0]], 3, device) == [0]
    assert banned([[6, 4, 0]], 2, device) == [0]
    assert banned([[6, 0]], 0, device) == [0]
    assert banned([[6, 5, 0], [7, 3, 4, 0]], 3, device) == []


def test_the_prompt_begins_nothing(device):
    assert banned([[8, 7, 6, 3, 0]], 1, device) == []


def test_words_do_not_hide_each_other(device):
    assert banned([[3, 1], [1, 2], [3, 10], [11]], 1, device) == [1, 10, 11]


def test_rejects_impossible_shapes(device):
    vector, matrix = int32([0], device), int32([[0, 0]], device)
    logits = torch.zeros(1, 4, device=device)
    tail = (matrix, vector, vector)
    with pytest.raises(ValueError, match="must be of one shape"):
        ban_words(
            logits,
            vector,
            vector,
            matrix,
            matrix[:, :1],
            matrix,
            matrix,
            vector,
            *tail,
            1,
        )
    with pytest.raises(ValueError, match="shorter than 1 logits rows"):
        ban_words(
            logits, vector[:0], vector, matrix, matrix, matrix, matrix, vector, *tail, 1
        )
    with pytest.raises(ValueError, match="cannot hold 2 words"):
        ban_words(
            logits, vector, vector, matrix, matrix, matrix, matrix, vector, *tail, 2
        )
