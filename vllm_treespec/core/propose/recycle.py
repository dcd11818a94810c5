"""Token recycling: what the target found likely after each token, lately.

Verification computes the target's logits at every node of a tree, and most of them are
thrown away. Here their best tokens are kept in a table with one row per token of the
vocabulary, and a tree is read off that table, breadth first (Token Recycling,
arXiv:2408.08696). No model runs, no text is searched, and nothing leaves the device.

A row is a fading mean of what the target said after its token rather than the last
thing it said, and a successor's share of it is its weight. How often successors of a
weight are right is measured, so that a row which has one clear favourite is read deep
and one that has not is read wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_treespec.core.calibrate import Calibration
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.propose.draft_tree import write_best

# Both measured on the bundled target's reading of Python that it was not trained on:
# accepted tokens change by 1% from 0.3 to 0.6 of the former, from 0.3 to 0.7 of the latter.
RATE = 0.45  # of what a row holds, replaced when its token is met again
PICK_WEIGHT = 0.5  # of what is learned at a node, the picked token; logits tell the rest
MAX_AGE = 4  # of a token's rows that one call learns: older ones weigh 1/10 of the newest
NONE = -1
LEAST_WEIGHT = 1e-9


@dataclass(frozen=True, slots=True)
class Successors:
    """Per token what followed it, likeliest first. The last row is nobody's and stays
    empty: what is not to be learned goes there."""

    token_ids: torch.Tensor  # [vocab_size + 1, k] int32, NONE: as yet unknown
    weights: torch.Tensor  # [vocab_size + 1, k] float32, at most 1 per row, 0: NONE

    @classmethod
    def allocate(cls, vocab_size: int, k: int, device: torch.device) -> Successors:
        shape = (vocab_size + 1, k)
        return cls(
            token_ids=torch.full(shape, NONE, dtype=torch.int32, device=device),
            weights=torch.zeros(shape, device=device),
        )

    @property
    def nobody(self) -> int:
        return self.token_ids.shape[0] - 1

    @property
    def num_bytes(self) -> int:
        tensors = (self.token_ids, self.weights)
        return sum(each.numel() * each.element_size() for each in tensors)

    def clear(self) -> None:
        self.token_ids.fill_(NONE)
        self.weights.zero_()

    def learn(
        self,
        token_ids: torch.Tensor,  # [num_rows] int64, nobody: learn nothing
        successors: torch.Tensor,  # [num_rows, n] int32, distinct
        weights: torch.Tensor,  # [num_rows, n] float32, at most 1 per row
        order: torch.Tensor,  # [num_rows] int64, distinct: the greatest is the newest
    ) -> None:
        """Blend what followed some tokens into their rows, the newest last.

        Rows of one token are written one after the other, for which of them a parallel
        write keeps is the device's mood: tensor-parallel ranks would draft different
        trees.
        """
        ages = _ages(token_ids, order)
        for age in reversed(range(MAX_AGE)):
            is_turn = ages == age
            self._blend(
                torch.where(is_turn, token_ids, self.nobody), successors, weights
            )

    def _blend(
        self, token_ids: torch.Tensor, successors: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """As ``learn``; no two tokens are alike, but for nobody."""
        old_ids, old = self.token_ids[token_ids], self.weights[token_ids] * (1 - RATE)
        is_same = successors[:, :, None] == old_ids[:, None, :]
        # One of a row's old ones at most is the same, so the sum has no order.
        new = RATE * weights + (is_same * old[:, None, :]).sum(2)
        old = old.masked_fill(is_same.any(1), 0.0)
        ids = torch.cat([successors, old_ids], 1)
        best = torch.cat([new, old], 1).sort(dim=1, descending=True, stable=True)
        kept = slice(old.shape[1])
        weights, ids = best.values[:, kept], ids.gather(1, best.indices[:, kept])
        is_kept = (weights > 0) & (token_ids < self.nobody)[:, None]
        self.token_ids[token_ids] = torch.where(is_kept, ids, NONE)
        self.weights[token_ids] = torch.where(is_kept, weights, 0.0)


class Recycler:
    """Trees from the table, for as many requests as a batch holds."""

    def __init__(
        self, *, vocab_size: int, k: int, depth: int, max_nodes: int, device: torch.device
    ) -> None:
        self.table = Successors.allocate(vocab_size, k, device)
        self.depth = depth
        self._max_nodes = max_nodes
        self._rates = Calibration(1, device)
        widths = [min(max_nodes, k)]  # by level
        while len(widths) < depth:
            widths.append(min(max_nodes, widths[-1] * k))
        # Of a request, if the table knows them all.
        self.num_candidates = min(max_nodes, sum(widths))

    def clear(self) -> None:
        """Forget every successor; what weights are worth stays true."""
        self.table.clear()

    def learn_prompt(
        self,
        token_ids: torch.Tensor,  # [num_tokens] int64
    ) -> None:
        """Take what a prompt goes on with for what the target would have said."""
        nobody = self.table.nobody
        parents, said = token_ids[:-1], token_ids[1:, None]
        is_known = (parents < nobody) & (said[:, 0] < nobody)
        self.table.learn(
            torch.where(is_known, parents, nobody),
            said.int(),
            torch.ones_like(said, dtype=torch.float32),
            torch.arange(parents.shape[0], device=parents.device),
        )

    def learn_nodes(
        self,
        token_ids: torch.Tensor,  # [num_nodes] int64, the nodes' own
        logits: torch.Tensor,  # [num_nodes, vocab_size], the target's
        picks: torch.Tensor,  # [num_nodes] int64, what it picked, NONE: its favourite
        is_node: torch.Tensor,  # [num_nodes] bool, False: padding
        is_accepted: torch.Tensor,  # [num_nodes] bool, they count as newer than others
    ) -> None:
        """Keep the best of the target's logits at every verified node."""
        table, num_nodes = self.table, token_ids.shape[0]
        k = min(table.token_ids.shape[1], logits.shape[1])
        best = logits.topk(k, dim=1)
        successors = best.indices
        picks = torch.where(picks < 0, successors[:, 0], picks)
        is_pick = successors == picks[:, None]
        # A pick that is none of the best takes the last one's place.
        is_pick[:, -1] |= ~is_pick.any(1)
        successors = torch.where(is_pick, picks[:, None], successors)
        # Among the best alone: to normalise over all would be to read them once more.
        shares = best.values.float().softmax(1)
        weights = PICK_WEIGHT * is_pick + (1 - PICK_WEIGHT) * shares
        # Masked tokens have no share; of broken logits nothing is learned.
        is_node = is_node & shares.isfinite().all(1)
        order = torch.arange(num_nodes, device=logits.device)
        table.learn(
            torch.where(is_node, token_ids, table.nobody),
            successors.int(),
            weights,
            order + num_nodes * is_accepted,
        )

    def learn_rates(
        self,
        roots: torch.Tensor,  # [num_reqs] int64, tokens that trees were rooted at
        emitted: torch.Tensor,  # [num_reqs, max_emitted] int64, what the target said
        num_emitted: torch.Tensor,  # [num_reqs] int32, columns past it are stale
    ) -> None:
        """Compare what the target said with the table, before it learns from that.

        A successor is right or wrong where its parent was accepted, in the tree of
        this table alone, however much of it was verified.
        """
        depth = min(self.depth, emitted.shape[1])
        said = emitted[:, :depth]
        is_said = torch.arange(depth, device=said.device) < num_emitted[:, None]
        said = torch.where(is_said, said, 0)
        parents = torch.cat([roots[:, None], said[:, :-1]], 1)
        successors = self.table.token_ids[parents]  # [num_reqs, depth, k]
        is_right = (successors == said[:, :, None]) & is_said[:, :, None]
        # A node is in the tree if all on the way to it were right.
        found = is_right.any(2).long().cumprod(1)
        is_reached = torch.cat([torch.ones_like(found[:, :1]), found[:, :-1]], 1) > 0
        is_known = (is_reached & is_said)[:, :, None] & (successors != NONE)
        labels = torch.where(is_known, is_right.to(torch.int8), -1)
        scores = self.table.weights[parents].clamp(min=LEAST_WEIGHT).log()
        self._rates.observe(scores.flatten(1)[None], labels.flatten(1)[None])

    def grow(
        self,
        roots: torch.Tensor,  # [num_reqs] int64, the newest tokens
        active: torch.Tensor,  # [num_reqs] bool, False: no candidates
        out: DeviceCandidates,
    ) -> None:
        """Write every request's likeliest paths, best first.

        Of the best ``max_nodes`` paths no level has more, so keeping as many of every
        level finds them.
        """
        tokens = roots.clamp(max=self.table.nobody)[:, None]
        num_reqs = roots.shape[0]
        scores = torch.where(active, 0.0, -torch.inf)[:, None]
        places = torch.full_like(tokens, -1)
        levels, num_places = [], 0
        for _ in range(self.depth):
            successors = self.table.token_ids[tokens]
            paths = scores[:, :, None] + self._log_probs(tokens)
            paths = paths.masked_fill(successors == NONE, -torch.inf).flatten(1)
            scores, best = paths.topk(min(self._max_nodes, paths.shape[1]), dim=1)
            rows = best // successors.shape[2]
            children = successors.flatten(1).gather(1, best)
            levels.append((children, places.gather(1, rows), scores))
            tokens = children.long().clamp(min=0)
            width = best.shape[1]
            places = torch.arange(num_places, num_places + width, device=roots.device)
            places = places.expand(num_reqs, -1)
            num_places += width
        write_best(*(torch.cat(part, 1) for part in zip(*levels, strict=True)), out)

    def _log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        """How likely each successor is right: ``[num_reqs, num_tokens, k]`` float32."""
        weights = self.table.weights[tokens]
        log_weights = weights.clamp(min=LEAST_WEIGHT).log().flatten(1)
        return self._rates.apply(log_weights[None])[0].view(weights.shape)


def _ages(
    token_ids: torch.Tensor,  # [num_rows] int64
    order: torch.Tensor,  # [num_rows] int64, distinct
) -> torch.Tensor:  # [num_rows] int64
    """How many newer rows each row's token has."""
    by_age = order.argsort()
    by_token = by_age[token_ids[by_age].argsort(stable=True)]
    ordered = token_ids[by_token].contiguous()
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    ages = last - torch.arange(ordered.shape[0], device=ordered.device)
    return torch.empty_like(ages).scatter_(0, by_token, ages)
