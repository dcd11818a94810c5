import torch

from vllm_treespec.kernels.recycling import NONE


def read_roots(
    slots: torch.Tensor,
    num_tokens: torch.Tensor,
    texts: torch.Tensor,
    roots: torch.Tensor,
) -> None:
    for row, slot in enumerate(slots[: roots.shape[1]].tolist()):
        text = [NONE, NONE, *texts[slot, : num_tokens[slot]].tolist()]
        roots[:, row] = torch.tensor(text[-2:])
