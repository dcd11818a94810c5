"""Token recycling: what the target found likely after each token, lately.

Verification computes the target's logits at every node of a tree, and most of them are
thrown away. Here their best tokens are kept in a table, and a tree is read off that
table, breadth first (Token Recycling, arXiv:2408.08696). No model runs, no text is
searched, and nothing leaves the device.

The paper's table has one row per token of the vocabulary. This one also has rows for
pairs of tokens, which are read instead where there is one: requests that share a table
disagree less about what follows two tokens than about what follows one. And a row is a
fading mean of what the target said, rather than the last thing it said. A successor's
share of it is its weight; how often successors of a weight are right is measured, so
that a row with one clear favourite is read deep and one without is read wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_treespec.core.calibrate import Calibration
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.propose.draft_tree import write_best

NUM_PAIRS = 2**17
# Both measured on the bundled target's reading of Python that it was not trained on:
# accepted tokens change by 2% from 0.3 to 0.6 of the former, and by 1% from 0.3 to 0.7
# of the latter.
RATE = 0.45  # of what a row holds, replaced when its context is met again
PICK_WEIGHT = (
    0.5  # of what is learned at a node, the picked token; logits tell the rest
)
# Of a context's occurrences in a prompt; what more it holds would weigh 1/10 of the last.
MAX_AGE = 4
NONE = -1
LEAST_WEIGHT = 1e-9
MIX = (0x9E3779B1, 0x85EBCA6B)  # odd, 32 bits: products with tokens fit 64


class Contexts(NamedTuple):
    """Tokens, each with the one before it. All of one shape."""

    before: torch.Tensor  # int64, NONE: there is none
    token_ids: torch.Tensor  # int64


@dataclass(frozen=True, slots=True)
class Successors:
    """Per context what followed it, likeliest first.

    Row ``t`` is token ``t``'s; pairs share the next ``num_pairs`` rows, the newest pair
    has them. The last row is nobody's and stays empty: what is not to be learned goes
    there.
    """

    vocab_size: int
    owners: torch.Tensor  # [num_rows] int64, the context that has the row, NONE: none
    token_ids: torch.Tensor  # [num_rows, k] int32, NONE: as yet unknown
    weights: torch.Tensor  # [num_rows, k] float32, at most 1 per row, 0: NONE

    @classmethod
    def allocate(
        cls, vocab_size: int, k: int, device: torch.device, num_pairs: int = NUM_PAIRS
    ) -> Successors:
        shape = (vocab_size + num_pairs + 1, k)
        return cls(
            vocab_size,
            owners=torch.full(shape[:1], NONE, dtype=torch.int64, device=device),
            token_ids=torch.full(shape, NONE, dtype=torch.int32, device=device),
            weights=torch.zeros(shape, device=device),
        )

    @property
    def nobody(self) -> int:
        return self.owners.shape[0] - 1

    @property
    def num_bytes(self) -> int:
        tensors = (self.owners, self.token_ids, self.weights)
        return sum(each.numel() * each.element_size() for each in tensors)

    def clear(self) -> None:
        self.owners.fill_(NONE)
        self.token_ids.fill_(NONE)
        self.weights.zero_()

    def rows_of(self, contexts: Contexts) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows ``[2, ...]`` int64 of the tokens alone and of the pairs, and who has
        to own them. What is no token, or no pair, is nobody's."""
        before, token_ids = contexts
        is_token = (token_ids >= 0) & (token_ids < self.vocab_size)
        is_pair = is_token & (before >= 0) & (before < self.vocab_size)
        mixed = before * MIX[0] + token_ids * MIX[1]
        place = (mixed ^ (mixed >> 16)) % (self.nobody - self.vocab_size)
        rows = torch.stack(
            [
                torch.where(is_token, token_ids, self.nobody),
                torch.where(is_pair, self.vocab_size + place, self.nobody),
            ]
        )
        owners = torch.stack([token_ids, (before + 1) * self.vocab_size + token_ids])
        return rows, owners

    def look_up(self, contexts: Contexts) -> tuple[torch.Tensor, torch.Tensor]:
        """The row of each context, and whether it is a pair's: as the contexts. Where
        the pair is not known, the token's own."""
        (tokens, pairs), owners = self.rows_of(contexts)
        is_pair = self.owners[pairs] == owners[1]
        return torch.where(is_pair, pairs, tokens), is_pair

    def learn(
        self,
        contexts: Contexts,  # [num_rows], token NONE: learn nothing
        successors: torch.Tensor,  # [num_rows, n] int32, distinct
        weights: torch.Tensor,  # [num_rows, n] float32, at most 1 per row
        order: torch.Tensor,  # [num_rows] int64, distinct: the greatest is the newest
        max_age: int = 1,
    ) -> None:
        """Blend what followed some contexts into their rows, the newest last.

        Of those that share a row, the ``max_age`` newest are written one after the
        other, for which of them a parallel write would keep is the device's mood:
        tensor-parallel ranks would draft different trees.
        """
        rows, owners = self.rows_of(contexts)
        for each, owner in zip(rows, owners, strict=True):
            ages = _ages(each, order)
            for age in reversed(range(max_age)):
                turn = torch.where(ages == age, each, self.nobody)
                self._blend(turn, owner, successors, weights)

    def _blend(
        self,
        rows: torch.Tensor,  # [num_rows] int64, no two alike but for nobody
        owners: torch.Tensor,  # [num_rows] int64
        successors: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        is_own = (self.owners[rows] == owners)[:, None]
        old_ids, old = self.token_ids[rows], self.weights[rows] * (1 - RATE) * is_own
        is_same = successors[:, :, None] == old_ids[:, None, :]
        # One of a row's old ones at most is the same, so the sum has no order.
        new = RATE * weights + (is_same * old[:, None, :]).sum(2)
        old = old.masked_fill(is_same.any(1), 0.0)
        ids = torch.cat([successors, old_ids], 1)
        best = torch.cat([new, old], 1).sort(dim=1, descending=True, stable=True)
        kept = slice(old.shape[1])
        weights, ids = best.values[:, kept], ids.gather(1, best.indices[:, kept])
        is_somebody = rows < self.nobody
        is_kept = (weights > 0) & is_somebody[:, None]
        self.owners[rows] = torch.where(is_somebody, owners, NONE)
        self.token_ids[rows] = torch.where(is_kept, ids, NONE)
        self.weights[rows] = torch.where(is_kept, weights, 0.0)


class Recycler:
    """Trees from the table, for as many requests as a batch holds."""

    def __init__(
        self,
        *,
        vocab_size: int,
        k: int,
        depth: int,
        max_nodes: int,
        device: torch.device,
    ) -> None:
        self.table = Successors.allocate(vocab_size, k, device)
        self.depth = depth
        self._max_nodes = max_nodes
        self._rates = Calibration(2, device)  # of tokens' rows and of pairs'
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
        nothing = token_ids.new_full((1,), NONE)
        parents, said = token_ids[:-1], token_ids[1:]
        is_known = (said >= 0) & (said < self.table.vocab_size)
        parents = torch.where(is_known, parents, NONE)
        self.table.learn(
            Contexts(torch.cat([nothing, token_ids[:-2]]), parents),
            said[:, None].int(),
            torch.ones_like(said[:, None], dtype=torch.float32),
            torch.arange(said.shape[0], device=said.device),
            MAX_AGE,
        )

    def learn_nodes(
        self,
        contexts: Contexts,  # [num_nodes], the nodes' tokens, NONE: padding
        logits: torch.Tensor,  # [num_nodes, vocab_size], the target's
        picks: torch.Tensor,  # [num_nodes] int64, what the target said at nodes that it
        # went along with, NONE: elsewhere
    ) -> None:
        """Keep the best of the target's logits at every verified node."""
        k, num_nodes = self.table.token_ids.shape[1], logits.shape[0]
        best = logits.topk(min(k, logits.shape[1]), dim=1)
        is_accepted = picks != NONE
        picks = torch.where(is_accepted, picks, best.indices[:, 0])
        is_pick = best.indices == picks[:, None]
        # A pick that is none of the best takes the last one's place.
        is_pick[:, -1] |= ~is_pick.any(1)
        successors = torch.where(is_pick, picks[:, None], best.indices)
        # Among the best alone: to normalise over all would be to read them once more.
        shares = best.values.float().softmax(1)
        # Masked tokens have no share; of broken logits nothing is learned.
        is_sound = shares.isfinite().all(1)
        order = torch.arange(num_nodes, device=logits.device)
        self.table.learn(
            Contexts(contexts.before, torch.where(is_sound, contexts.token_ids, NONE)),
            successors.int(),
            PICK_WEIGHT * is_pick + (1 - PICK_WEIGHT) * shares,
            order + num_nodes * is_accepted,  # what was only guessed counts as older
        )

    def learn_rates(
        self,
        roots: Contexts,  # [num_reqs], that trees were rooted at
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
        said = torch.where(is_said, said, NONE)
        token_ids = torch.cat([roots.token_ids[:, None], said[:, :-1]], 1)
        before = torch.cat([roots.before[:, None], token_ids[:, :-1]], 1)
        rows, is_pair = self.table.look_up(Contexts(before, token_ids))
        successors = self.table.token_ids[rows]  # [num_reqs, depth, k]
        is_right = (successors == said[:, :, None]) & is_said[:, :, None]
        # A node is in the tree if all on the way to it were right.
        found = is_right.any(2).long().cumprod(1)
        is_reached = torch.cat([torch.ones_like(found[:, :1]), found[:, :-1]], 1) > 0
        is_known = (is_reached & is_said)[:, :, None] & (successors != NONE)
        of_kind = torch.stack([~is_pair, is_pair])[..., None] & is_known
        labels = torch.where(of_kind, is_right.to(torch.int8), -1).flatten(2)
        scores = self.table.weights[rows].clamp(min=LEAST_WEIGHT).log().flatten(1)
        self._rates.observe(scores.expand(2, -1, -1), labels)

    def grow(
        self,
        roots: Contexts,  # [num_reqs], the newest tokens
        active: torch.Tensor,  # [num_reqs] bool, False: no candidates
        out: DeviceCandidates,
    ) -> None:
        """Write every request's likeliest paths, best first.

        Of the best ``max_nodes`` paths no level has more, so keeping as many of every
        level finds them.
        """
        before, token_ids = roots.before[:, None], roots.token_ids[:, None]
        scores = torch.where(active, 0.0, -torch.inf)[:, None]
        places = torch.full_like(token_ids, -1)
        levels, num_places = [], 0
        for _ in range(self.depth):
            successors, log_probs = self._successors(Contexts(before, token_ids))
            k = successors.shape[2]
            paths = (scores[:, :, None] + log_probs).flatten(1)
            scores, best = paths.topk(min(self._max_nodes, paths.shape[1]), dim=1)
            children = successors.flatten(1).gather(1, best)
            levels.append((children, places.gather(1, best // k), scores))
            before, token_ids = token_ids.gather(1, best // k), children.long()
            width = best.shape[1]
            places = torch.arange(num_places, num_places + width, device=best.device)
            places = places.expand(best.shape[0], -1)
            num_places += width
        children, parents, scores = (
            torch.cat(part, 1) for part in zip(*levels, strict=True)
        )
        write_best(children, parents, scores, out)

    def _successors(self, contexts: Contexts) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int32 and how likely each is right, float32:
        ``[num_reqs, num_contexts, k]``, -inf where nothing is known."""
        rows, is_pair = self.table.look_up(contexts)
        successors, weights = self.table.token_ids[rows], self.table.weights[rows]
        scores = weights.clamp(min=LEAST_WEIGHT).log().flatten(1)
        rates = self._rates.apply(scores.expand(2, -1, -1)).view(2, *weights.shape)
        log_probs = torch.where(is_pair[:, :, None], rates[1], rates[0])
        return successors, log_probs.masked_fill(successors == NONE, -torch.inf)


def _ages(
    rows: torch.Tensor,  # [num_rows] int64
    order: torch.Tensor,  # [num_rows] int64, distinct
) -> torch.Tensor:  # [num_rows] int64
    """How many newer ones are the same row."""
    by_order = order.argsort()
    by_row = by_order[rows[by_order].argsort(stable=True)]
    ordered = rows[by_row].contiguous()
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    ages = last - torch.arange(ordered.shape[0], device=ordered.device)
    return torch.empty_like(ages).scatter_(0, by_row, ages)
