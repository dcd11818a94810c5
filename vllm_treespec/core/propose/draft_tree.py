"""Growing a token tree with a draft model, one forward per level.

Everything has a static shape and stays on the device, so that a CUDA graph can hold
the whole growth. The draft model itself is a callback: this file knows no vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

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
    """Draft trees of one shape, for as many requests as a batch holds.

    All that lies between two levels is kept in buffers, so that a CUDA graph can hold
    one level as well as all of them.
    """

    def __init__(
        self,
        shape: Shape,
        max_num_reqs: int,
        device: torch.device,
        min_reach: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            min_reach: scalar float32, read at every level: a request grows no deeper
                once the draft finds its next rows less likely than that, together, to
                hold the target's path. None: no request stops early.
        """
        self.shape = shape
        self._min_reach = min_reach
        first_nodes, first_places = [0], [0]
        for level, num_rows in enumerate(shape.num_rows):
            first_nodes.append(first_nodes[-1] + num_rows)
            first_places.append(first_places[-1] + shape.kept(level).shape[0])
        self.first_nodes = tuple(first_nodes)
        self.max_num_nodes = first_nodes[-1]  # with KV in the draft's cache
        # Candidates of the first levels, before the best are chosen.
        self.num_candidates_at = tuple(first_places)
        self.num_candidates = first_places[-1]
        self._found = _Places.allocate(max_num_reqs, shape, device)
        # [max_num_reqs, num_candidates] int32: the node that a candidate is in the
        # draft's cache, -1: none.
        self.nodes = torch.full_like(self._found.nodes, -1)
        # [max_num_reqs, num_candidates] bool: which candidates were drawn, by requests
        # that draw.
        self.drawn = torch.zeros_like(self.nodes, dtype=torch.bool)
        # [max_num_reqs] int64: levels that a request has, the root's excluded.
        self.num_levels = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        # [max_num_reqs, widest level] int64: places of the next level's rows.
        self._rows = torch.zeros(
            max_num_reqs, max(shape.num_rows), dtype=torch.int64, device=device
        )
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
        """Write every request's candidates, one level after the other."""
        num_reqs = logits.shape[0]
        self.begin(roots, max_len, active)
        self.add_level(0, logits, roots, temperatures, drawing)
        for level in range(1, self.depth):
            logits = forward(self.frontier(level, num_reqs))
            self.add_level(level, logits, roots, temperatures, drawing)
        self.finish(num_reqs, out, drawing)

    def begin(
        self,
        roots: torch.Tensor,  # [num_reqs] int32, position of the newest token
        max_len: int,  # positions that the draft may use
        active: torch.Tensor,  # [num_reqs] bool, False: no candidates
    ) -> None:
        """Forget the last trees; these requests get levels as far as they fit."""
        num_reqs = roots.shape[0]
        fits = roots[:, None] + self._room <= max_len  # monotone
        self.num_levels.zero_()
        self.num_levels[:num_reqs] = torch.where(active, fits.sum(1), 0)
        self._found.scores.fill_(-torch.inf)
        self._found.nodes.fill_(-1)

    def goes_on(self, level: int) -> bool:
        """Whether some request has a level below this one; waits for the device."""
        return bool((self.num_levels > level + 1).any())

    def frontier(self, level: int, num_reqs: int) -> Frontier:
        """The rows to run the draft on, of a level below the root's."""
        rows = self._rows[:num_reqs, : self.shape.num_rows[level]]
        return Frontier(
            self._found.token_ids[:num_reqs].gather(1, rows),
            self.num_levels[:num_reqs] > level,
            level,
            self.first_nodes[level],
        )

    def add_level(
        self,
        level: int,
        logits: torch.Tensor,  # [num_reqs * num_rows, vocab_size]
        roots: torch.Tensor,  # [num_reqs] int32, position of the newest token
        temperatures: torch.Tensor,  # [num_reqs] float32, at which scores are taken
        drawing: Drawing | None = None,
    ) -> None:
        """Add the children of a level's rows, and choose the next level's among them."""
        shape, num_reqs = self.shape, roots.shape[0]
        num_fixed, num_children = shape.num_fixed(level), shape.num_children[level]
        keys = logits
        if drawing is not None:
            logits, keys = drawing.perturb(
                logits, self.first_nodes[level], roots + level, num_fixed
            )
        children, log_probs = _best_children(logits, keys, temperatures, num_children)
        if drawing is not None:
            log_probs = drawing.score(log_probs, num_reqs, num_fixed)
        found, kept = self._found.of(num_reqs), shape.kept(level)
        rows = kept // num_children  # of each kept child
        if level == 0:
            above = log_probs.new_zeros(num_reqs, 1)
            parents = torch.full_like(above, -1, dtype=torch.int64)
        else:
            parents = self._rows[:num_reqs, : shape.num_rows[level]]
            above = found.scores.gather(1, parents)
        scores = above[:, rows] + log_probs.view(num_reqs, -1)[:, kept]
        scores.masked_fill_((self.num_levels[:num_reqs] <= level)[:, None], -torch.inf)
        all_drawn = None if drawing is None else drawing.all_drawn(num_reqs)
        if all_drawn is not None:
            planned = shape.planned(level) | ~all_drawn
            scores.masked_fill_(~planned, -torch.inf)
        first, last = self.num_candidates_at[level : level + 2]
        found.token_ids[:, first:last] = children.view(num_reqs, -1)[:, kept]
        found.parents[:, first:last] = parents[:, rows]
        found.scores[:, first:last] = scores
        if level + 1 < self.depth:
            self._choose_rows(level, scores, rows, all_drawn)

    def _choose_rows(
        self,
        level: int,
        scores: torch.Tensor,  # [num_reqs, num_kept] float32
        rows: torch.Tensor,  # [num_kept] int64, this level's row of every kept child
        all_drawn: torch.Tensor | None,  # [num_reqs, 1] bool
    ) -> None:
        """Decide which children the draft runs on next, and what they see."""
        num_reqs = scores.shape[0]
        chosen = self.shape.next_rows(level, scores)
        if all_drawn is not None:
            chosen = torch.where(all_drawn, self.shape.planned_rows(level), chosen)
        self._rows[:num_reqs, : chosen.shape[1]] = (
            self.num_candidates_at[level] + chosen
        )
        first, last = self.first_nodes[level + 1 : level + 3]
        self._see_ancestors(self.first_nodes[level] + rows[chosen], first, last)
        nodes = torch.arange(first, last, dtype=torch.int32, device=scores.device)
        places = slice(*self.num_candidates_at[level : level + 2])
        self._found.nodes[:num_reqs, places].scatter_(
            1, chosen, nodes.expand(num_reqs, -1)
        )
        if self._min_reach is not None:
            reach = scores.gather(1, chosen).exp().sum(1)
            stopped = reach < self._min_reach
            num_levels = self.num_levels[:num_reqs]
            num_levels.copy_(
                torch.where(stopped, num_levels.clamp(max=level + 1), num_levels)
            )

    def finish(
        self,
        num_reqs: int,
        out: DeviceCandidates,
        drawing: Drawing | None = None,
    ) -> None:
        """Write every request's candidates: its likeliest, best first; or, if all are
        drawn, those that its plan keeps, in the order of drawing."""
        found = self._found.of(num_reqs)
        all_drawn = None if drawing is None else drawing.all_drawn(num_reqs)
        best = write_best(
            found.token_ids, found.parents, found.scores, out, keep_order=all_drawn
        )
        width = best.shape[1]
        self.nodes[:num_reqs, :width] = found.nodes.gather(1, best)
        if drawing is None or all_drawn is None:
            return
        self.drawn[:num_reqs, :width] = all_drawn | ~found.is_fixed.gather(1, best)
        # Other proposers' candidates share the tree with them.
        counts, most = out.num_candidates[:num_reqs], self.shape.num_planned
        is_mixed = drawing.is_mixed[:num_reqs]
        counts.copy_(torch.where(is_mixed, counts.clamp(max=most), counts))

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
class _Places:
    """Children of all levels, in the order of their *places*: level by level."""

    token_ids: torch.Tensor  # [num_reqs, num_places] int32
    parents: torch.Tensor  # [num_reqs, num_places] int64, places, -1: the root
    scores: torch.Tensor  # [num_reqs, num_places] float32, -inf: not a candidate
    nodes: torch.Tensor  # [num_reqs, num_places] int32, -1: the draft did not run on it
    is_fixed: torch.Tensor  # [num_reqs, num_places] bool, even where a node mixes

    @classmethod
    def allocate(cls, max_num_reqs: int, shape: Shape, device: torch.device) -> _Places:
        is_fixed = [
            shape.kept(level) % num_children < shape.num_fixed(level)
            for level, num_children in enumerate(shape.num_children)
        ]
        fixed = torch.cat(is_fixed).expand(max_num_reqs, -1)

        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(fixed.shape, dtype=dtype, device=device)

        return cls(
            token_ids=zeros(torch.int32),
            parents=zeros(torch.int64),
            scores=zeros(torch.float32),
            nodes=zeros(torch.int32),
            is_fixed=fixed,
        )

    def of(self, num_reqs: int) -> _Places:
        """The first requests' share."""
        return _Places(*(getattr(self, each.name)[:num_reqs] for each in fields(self)))


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


def write_best(
    token_ids: torch.Tensor,  # [num_reqs, num_places] int32
    parents: torch.Tensor,  # [num_reqs, num_places] int64, places, -1: the root
    scores: torch.Tensor,  # [num_reqs, num_places] float32, -inf: not a candidate
    out: DeviceCandidates,
    keep_order: torch.Tensor | None = None,  # [num_reqs, 1] bool, see below
) -> torch.Tensor:
    """Write the best places, best first, and return them: ``[num_reqs, width]`` int64.
    Path scores only fall from parent to child, and a parent's place is below its
    child's, so a stable order keeps parents in front.

    Args:
        keep_order: candidates stay in the order of their places, whatever their scores.
            Where all are drawn, that is the order in which they were drawn.
    """
    num_reqs, num_places = token_ids.shape
    width = min(out.token_ids.shape[1], num_places)
    # A broken draft costs speed only: what is not a number ranks last and is not used.
    scores = scores.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    keys = scores
    if keep_order is not None:
        keys = torch.where(keep_order & scores.isfinite(), 0.0, scores)
    order = keys.sort(dim=1, descending=True, stable=True).indices
    rank_of = order.argsort(dim=1)
    best = order[:, :width]
    parents = parents.gather(1, best)
    parent_ranks = rank_of.gather(1, parents.clamp(min=0))
    scores = scores.gather(1, best)
    out.token_ids[:num_reqs, :width] = token_ids.gather(1, best)
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
