import torch

from vllm_treespec.kernels.reference.voices import listen, mix, of_parents


def rate_candidates(
    slots: torch.Tensor,
    parents: torch.Tensor,
    proposers: torch.Tensor,
    own_scores: torch.Tensor,
    num_merged: torch.Tensor,
    sibling_bits: torch.Tensor,
    slopes: torch.Tensor,
    offsets: torch.Tensor,
    is_drawn: torch.Tensor | None,
    scores: torch.Tensor,
) -> None:
    slots = slots.long()
    columns = torch.arange(proposers.shape[1], device=slots.device)
    is_node = columns < num_merged[slots, None]
    above, bits = torch.where(
        is_node, torch.stack([parents[slots], proposers[slots]]), -1
    )
    own = torch.where(is_node, own_scores[:, slots], -torch.inf)
    if is_drawn is not None:
        draws = is_drawn[: len(slots), None] & is_node
        own[0].masked_fill_(draws, -torch.inf)
        own_scores[0, slots] = torch.where(is_node, own[0], own_scores[0, slots])

    mixed = mix(listen(above, bits, own, sibling_bits[slots]), slopes, offsets)
    rated = torch.nn.functional.logsigmoid(mixed).nan_to_num(nan=-torch.inf)
    ancestors = above
    while (ancestors >= 0).any():
        # each round reaches twice as far
        rated = rated + of_parents(rated, ancestors, at_root=0.0)
        ancestors = of_parents(ancestors, ancestors, at_root=-1)
    if is_drawn is not None:
        rated.masked_fill_(draws & (bits & 1 > 0), 0.0)
    scores[slots] = torch.where(is_node, rated, scores[slots])
