"""kernels/newest_tokens.py against its reference."""

import pytest
import torch

from vllm_treespec.kernels.newest_tokens import newest_tokens
from vllm_treespec.kernels.reference.newest_tokens import newest_tokens as reference

STALE = -7


@pytest.mark.parametrize("max_new", [1, 2, 9, 33, 200])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_matches_reference(max_new: int, dtype: torch.dtype, device: torch.device):
    gen = torch.Generator().manual_seed(max_new)
    width = max_new + 40
    # views of wider buffers, with a stride of their own
    texts = torch.randint(1000, (6, width + 8), generator=gen).int().to(device)
    token_ids = texts[:, 3 : 3 + width]
    slots = torch.tensor([4, 0, 5, 2], dtype=dtype, device=device)
    counts = torch.tensor([max_new, 0, 1, max_new // 2 + 1]).int().to(device)
    lens = torch.tensor([0, 99, max_new + 7, 99, width, 1]).int().to(device)
    buffer = torch.full((5, max_new + 6), STALE, dtype=torch.int32, device=device)
    newest = buffer[:4, 2 : 3 + max_new]
    expected = torch.full((4, 1 + max_new), STALE, dtype=torch.int32, device=device)
    newest_tokens(slots, counts, token_ids, lens, newest)
    reference(slots, counts, token_ids, lens, expected)
    assert torch.equal(newest, expected)
    assert (buffer[:, :2] == STALE).all() and (buffer[:, 3 + max_new :] == STALE).all()
    assert (buffer[4] == STALE).all()
    # A full text's last tokens, nothing, a text's only token, and the end of another.
    assert newest[0].tolist() == [max_new, *texts[4, 3 + 40 : 3 + width].tolist()]
    assert newest[1].tolist() == [0] * (1 + max_new)
    assert newest[2, :2].tolist() == [1, int(token_ids[5, 0])]
    assert newest[3, 1] == token_ids[2, int(lens[2] - counts[3])]


def test_rejects_batches_longer_than_their_slots(device: torch.device):
    vector = torch.zeros(2, dtype=torch.int32, device=device)
    matrix = torch.zeros(3, 4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="shorter than 3 rows"):
        newest_tokens(vector, vector, matrix, vector, matrix)
