import torch


def newest_tokens(
    slots: torch.Tensor,
    num_sampled: torch.Tensor,
    token_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    newest: torch.Tensor,
) -> None:
    num_reqs, max_new = newest.shape[0], newest.shape[1] - 1
    slots, counts = slots[:num_reqs].long(), num_sampled[:num_reqs, None]
    new = torch.arange(max_new, device=slots.device)
    columns = (num_tokens[slots][:, None] - counts + new).clamp(
        0, token_ids.shape[1] - 1
    )
    newest[:, :1] = counts
    newest[:, 1:] = torch.where(
        new < counts, token_ids[slots[:, None], columns.long()], 0
    )
