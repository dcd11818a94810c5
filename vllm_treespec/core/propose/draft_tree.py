"""Growing a token tree with a draft model, one forward per level.

Everything has a static shape and stays on the device, so that a CUDA graph can hold
the whole growth. The draft model itself is a callback: this file knows no vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_treespec.core.attend import BatchTrees
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.propose.drawing import Drawing
from vllm_treespec.core.propose.shapes import Shape
from vllm_treespec.core.tree import MASK_BITS

# Rows of float32 logits that are normalised at once, to bound the memory it takes.
MAX_NORMALISED = 2**26
# A draft is trained to sample. Of a target that does not, it is too modest: on the
# bundled pair, greedy trees accept 2 to 6% more at this temperature than at 1, which
# is the best where the target samples at 1.
MIN_TEMPERATURE = 0.7


@dataclass(frozen=True, slots=True)
class Frontier:
    """The rows of one level, the same number for every request.

    Node ``first_node + j`` of a request is its row ``j``; node 0 is the root. A node's
    KV goes to ``root + node`` and its position is ``root + depth``.
    """

    token_ids: torch.Tensor  # [num_reqs, num_rows] int32
    in_range: torch.Tensor  # [num_reqs] bool, False: write no KV for this request
    depth: int
    first_node: int


# Logits [num_reqs * num_rows, vocab_size] of a level's rows.
Forward = Callable[[Frontier], torch.Tensor]


class TreeGrower:
    """Draft trees of one shape, for as many requests as a batch holds."""

    def __init__(self, shape: Shape, max_num_reqs: int, device: torch.device) -> None:
        self.shape = shape
        # [max_num_reqs, num_candidates] int32: the node that a candidate is in the
        # draft's cache, -1: none.
        self.nodes = torch.full(
            (max_num_reqs, self.num_candidates), -1, dtype=torch.int32, device=device
        )
        # [max_num_reqs, num_candidates] bool: which candidates were drawn, by requests
        # that draw.
        self.drawn = torch.zeros_like(self.nodes, dtype=torch.bool)
        first_nodes = [0]
        for num_rows in shape.num_rows:
            first_nodes.append(first_nodes[-1] + num_rows)
        self.first_nodes = tuple(first_nodes)
        self.max_num_nodes = first_nodes[-1]  # with KV in the draft's cache
        # What the draft's attention sees; rows as in this step's batch.
        self.batch = BatchTrees.allocate(max_num_reqs, self.max_num_nodes, device)
        self._own_bits = _own_bits(self.batch.masks)
        self.batch.masks[:, 0] = self._own_bits[0]
        for depth, num_rows in enumerate(shape.num_rows):
            first = first_nodes[depth]
            self.batch.depths[:, first : first + num_rows] = depth
        # Nodes in the cache once a level's rows are: what that level needs room for.
        self._room = torch.tensor(first_nodes[1:], dtype=torch.int32, device=device)

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return len(self.shape.num_rows)

    @property
    def num_candidates(self) -> int:
        """Candidates that a request gets, before the best are chosen."""
        levels = range(self.depth)
        return sum(self.shape.kept(level).shape[0] for level in levels)

    def grow(
        self,
        logits: torch.Tensor,  # [num_reqs, vocab_size], after the newest token
        roots: torch.Tensor,  # [num_reqs] int32, position of the newest token
        max_len: int,  # positions that the draft may use
        active: torch.Tensor,  # [num_reqs] bool, False: no candidates
        temperatures: torch.Tensor,  # [num_reqs] float32, at which scores are taken
        forward: Forward,
        out: DeviceCandidates,
        drawing: Drawing | None = None,
    ) -> None:
        """Write every request's candidates: its likeliest, best first; or, if all are
        drawn, those that its plan keeps, in the order of drawing."""
        num_reqs, shape = logits.shape[0], self.shape
        all_drawn = None
        if drawing is not None:
            all_drawn = drawing.is_drawn[:num_reqs] & ~drawing.is_mixed[:num_reqs]
            all_drawn = all_drawn[:, None]
        fits = roots[:, None] + self._room <= max_len
        num_levels = torch.where(active, fits.sum(1), 0)  # fits is monotone
        row_scores = logits.new_zeros(num_reqs, 1, dtype=torch.float32)
        row_places = torch.full_like(row_scores, -1, dtype=torch.int64)
        row_nodes = torch.zeros_like(row_places)
        levels: list[_Level] = []
        for depth, num_children in enumerate(shape.num_children):
            num_fixed = shape.num_fixed(depth)
            keys = logits
            if drawing is not None:
                first = self.first_nodes[depth]
                logits, keys = drawing.perturb(logits, first, roots + depth, num_fixed)
            children, log_probs = _best_children(
                logits, keys, temperatures, num_children
            )
            if drawing is not None:
                log_probs = drawing.score(log_probs, num_reqs, num_fixed)
            kept = shape.kept(depth)
            rows = kept // num_children
            scores = row_scores[:, rows] + log_probs.view(num_reqs, -1)[:, kept]
            scores.masked_fill_((num_levels <= depth)[:, None], -torch.inf)
            if all_drawn is not None:
                planned = shape.planned(depth) | ~all_drawn
                scores.masked_fill_(~planned, -torch.inf)
            level = _Level(
                token_ids=children.view(num_reqs, -1)[:, kept],
                parents=row_places[:, rows],
                scores=scores,
                nodes=torch.full_like(scores, -1, dtype=torch.int32),
                is_fixed=(kept % num_children < num_fixed).expand_as(scores),
            )
            levels.append(level)
            if depth + 1 == self.depth:
                break
            chosen = shape.next_rows(depth, scores)
            if all_drawn is not None:
                chosen = torch.where(all_drawn, shape.planned_rows(depth), chosen)
            first, last = self.first_nodes[depth + 1 : depth + 3]
            self._see_ancestors(row_nodes.gather(1, rows[chosen]), first, last)
            row_scores = scores.gather(1, chosen)
            row_places = sum(each.scores.shape[1] for each in levels[:-1]) + chosen
            row_nodes = torch.arange(first, last, device=chosen.device)
            row_nodes = row_nodes.expand(num_reqs, -1)
            level.nodes.scatter_(1, chosen, row_nodes.int())
            logits = forward(
                Frontier(
                    level.token_ids.gather(1, chosen),
                    num_levels > depth + 1,
                    depth + 1,
                    first,
                )
            )
        found = _Level.concatenate(levels)
        best = _rank(found, all_drawn, out)
        width = best.shape[1]
        self.nodes[:num_reqs, :width] = found.nodes.gather(1, best)
        if drawing is None or all_drawn is None:
            return
        self.drawn[:num_reqs, :width] = all_drawn | ~found.is_fixed.gather(1, best)
        # Other proposers' candidates share the tree with them.
        counts = out.num_candidates[:num_reqs]
        is_mixed = drawing.is_mixed[:num_reqs]
        counts.copy_(torch.where(is_mixed, counts.clamp(max=shape.num_planned), counts))

    def _see_ancestors(self, parents: torch.Tensor, first: int, last: int) -> None:
        """Let nodes ``first`` to ``last`` see their parents' ancestors and themselves.

        Args:
            parents: ``[num_reqs, last - first]`` int64, nodes.
        """
        num_reqs = parents.shape[0]
        masks = self.batch.masks[:num_reqs]
        above = masks.gather(1, parents[:, :, None].expand(-1, -1, masks.shape[2]))
        masks[:, first:last] = above | self._own_bits[first:last]
        self.batch.num_nodes[:num_reqs] = last


@dataclass(frozen=True, slots=True)
class _Level:
    """Candidates of one level, or of all, in the order of their *places*."""

    token_ids: torch.Tensor  # [num_reqs, num_places] int32
    parents: torch.Tensor  # [num_reqs, num_places] int64, places, -1: the root
    scores: torch.Tensor  # [num_reqs, num_places] float32, -inf: not a candidate
    nodes: torch.Tensor  # [num_reqs, num_places] int32, -1: the draft did not run on it
    is_fixed: torch.Tensor  # [num_reqs, num_places] bool, even where a node mixes

    @classmethod
    def concatenate(cls, levels: list[_Level]) -> _Level:
        return cls(
            torch.cat([each.token_ids for each in levels], 1),
            torch.cat([each.parents for each in levels], 1),
            torch.cat([each.scores for each in levels], 1),
            torch.cat([each.nodes for each in levels], 1),
            torch.cat([each.is_fixed for each in levels], 1),
        )


def _best_children(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    keys: torch.Tensor,  # [num_rows, vocab_size], what decides which are best
    temperatures: torch.Tensor,  # [num_reqs] float32, each for as many rows
    num_children: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int32 and log-probabilities float32, ``[num_rows, num_children]``."""
    token_ids = keys.topk(num_children, dim=-1).indices
    chunk = max(1, MAX_NORMALISED // logits.shape[1])
    num_reqs, num_rows = temperatures.shape[0], logits.shape[0]
    divisors = temperatures.repeat_interleave(
        num_rows // num_reqs, output_size=num_rows
    )[:, None]
    norms = [
        (part.float() / divisor).logsumexp(-1)
        for part, divisor in zip(
            torch.split(logits, chunk), torch.split(divisors, chunk), strict=True
        )
    ]
    values = logits.gather(1, token_ids).float() / divisors
    return token_ids.int(), values - torch.cat(norms)[:, None]


def _rank(
    found: _Level,
    all_drawn: torch.Tensor | None,  # [num_reqs, 1] bool
    out: DeviceCandidates,
) -> torch.Tensor:
    """The best places, best first: ``[num_reqs, width]`` int64. Path scores only fall
    from parent to child, and a parent's place is below its child's, so a stable order
    keeps parents in front.

    Where all are drawn they stay in the order of their places, whatever their scores:
    that is the order in which they were drawn.
    """
    num_reqs, num_places = found.token_ids.shape
    width = min(out.token_ids.shape[1], num_places)
    # A broken draft costs speed only: what is not a number ranks last and is not used.
    scores = found.scores.nan_to_num(
        nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf
    )
    keys = scores
    if all_drawn is not None:
        keys = torch.where(all_drawn & scores.isfinite(), 0.0, scores)
    order = keys.sort(dim=1, descending=True, stable=True).indices
    rank_of = order.argsort(dim=1)
    best = order[:, :width]
    parents = found.parents.gather(1, best)
    parent_ranks = rank_of.gather(1, parents.clamp(min=0))
    scores = scores.gather(1, best)
    out.token_ids[:num_reqs, :width] = found.token_ids.gather(1, best)
    out.parents[:num_reqs, :width] = torch.where(parents < 0, -1, parent_ranks).int()
    out.scores[:num_reqs, :width] = scores
    out.num_candidates[:num_reqs] = scores.isfinite().sum(1)
    return best


def _own_bits(masks: torch.Tensor) -> torch.Tensor:
    """``[max_num_nodes, words]`` int32, every node's own bit."""
    bits = torch.zeros_like(masks[0])
    for node in range(bits.shape[0]):
        # Bit 31 is the sign of an int32.
        bit = node % MASK_BITS
        bits[node, node // MASK_BITS] = 1 << bit if bit < MASK_BITS - 1 else -(1 << bit)
    return bits
