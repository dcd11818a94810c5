import torch

from vllm_treespec.kernels.recycling import NONE
from vllm_treespec.kernels.reference.successors import log_rates, log_weights, look_up


def grow_paths(
    before: torch.Tensor,
    token_ids: torch.Tensor,
    active: torch.Tensor,
    vocab_size: int,
    owners: torch.Tensor,
    table_ids: torch.Tensor,
    table_weights: torch.Tensor,
    knots: torch.Tensor,
    depth: int,
    found: torch.Tensor,
    out_ids: torch.Tensor,
    out_parents: torch.Tensor,
    out_scores: torch.Tensor,
    out_num: torch.Tensor,
) -> None:
    num_reqs, max_nodes = before.shape[0], out_ids.shape[1]
    before, token_ids = before[:, None], token_ids[:, None]
    scores = torch.where(active[:num_reqs] > 0, 0.0, -torch.inf)[:, None]
    places = torch.full_like(token_ids, -1)
    levels, first_place = [], 0
    for _ in range(depth):
        rows, is_pair = look_up(before, token_ids, vocab_size, owners)
        successors = table_ids[rows]
        log_probs = log_rates(log_weights(table_weights[rows]), is_pair, knots)
        log_probs = log_probs.masked_fill(successors == NONE, -torch.inf)
        k = successors.shape[2]
        paths = (scores[:, :, None] + log_probs).flatten(1)
        likeliest = paths.sort(dim=1, descending=True, stable=True).indices
        best = likeliest[:, :max_nodes].sort(dim=1).values
        scores = paths.gather(1, best)
        children = successors.flatten(1).gather(1, best)
        levels.append((children, places.gather(1, best // k), scores))
        before, token_ids = token_ids.gather(1, best // k), children.long()
        width = best.shape[1]
        places = torch.arange(first_place, first_place + width, device=best.device)
        places = places.expand(num_reqs, -1)
        first_place += width
    children, parents, scores = (
        torch.cat(part, 1) for part in zip(*levels, strict=True)
    )
    # Path scores only fall, and a parent's place is below its child's.
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank_of, best = order.argsort(dim=1), order[:, :max_nodes]
    parents, scores = parents.gather(1, best), scores.gather(1, best)
    is_kept = scores.isfinite()
    ranks = torch.where(parents < 0, -1, rank_of.gather(1, parents.clamp(min=0)))
    width = best.shape[1]
    for out, values in (
        (out_ids, children.gather(1, best)),
        (out_parents, ranks.int()),
        (out_scores, scores),
    ):
        kept = out[:num_reqs, :width]
        kept.copy_(torch.where(is_kept, values, kept))
    out_num[:num_reqs] = is_kept.sum(1)
