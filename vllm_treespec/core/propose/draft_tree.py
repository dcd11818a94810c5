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
from vllm_treespec.core.propose.shapes import Shape
from vllm_treespec.core.tree import MASK_BITS

# Rows of float32 logits that are normalised at once, to bound the memory it takes.
MAX_NORMALISED = 2**26


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
        forward: Forward,
        out: DeviceCandidates,
    ) -> None:
        """Write every request's likeliest candidates, best first."""
        num_reqs, shape, batch = logits.shape[0], self.shape, self.batch
        fits = roots[:, None] + self._room <= max_len
        num_levels = torch.where(active, fits.sum(1), 0)  # fits is monotone
        row_scores = logits.new_zeros(num_reqs, 1, dtype=torch.float32)
        row_places = torch.full_like(row_scores, -1, dtype=torch.int64)
        row_nodes = torch.zeros_like(row_places)
        token_ids, parents, scores = [], [], []
        num_placed = 0
        for level in range(self.depth):
            num_children = shape.num_children[level]
            children, log_probs = _best_children(logits, num_children)
            kept = shape.kept(level)
            kept_rows = kept // num_children
            kept_tokens = children.view(num_reqs, -1)[:, kept]
            kept_scores = (
                row_scores[:, kept_rows] + log_probs.view(num_reqs, -1)[:, kept]
            )
            kept_scores.masked_fill_((num_levels <= level)[:, None], -torch.inf)
            token_ids.append(kept_tokens)
            parents.append(row_places[:, kept_rows])
            scores.append(kept_scores)
            if level + 1 == self.depth:
                break
            chosen = shape.next_rows(level, kept_scores)
            first, last = self.first_nodes[level + 1 : level + 3]
            parent_nodes = row_nodes.gather(1, kept_rows[chosen])
            batch.masks[:num_reqs, first:last] = (
                _rows(batch.masks[:num_reqs], parent_nodes) | self._own_bits[first:last]
            )
            batch.num_nodes[:num_reqs] = last
            row_scores = kept_scores.gather(1, chosen)
            row_places = num_placed + chosen
            row_nodes = torch.arange(first, last, device=chosen.device).expand(
                num_reqs, -1
            )
            num_placed += kept.shape[0]
            logits = forward(
                Frontier(
                    kept_tokens.gather(1, chosen),
                    num_levels > level + 1,
                    level + 1,
                    first,
                )
            )
        _keep_best(
            torch.cat(token_ids, 1), torch.cat(parents, 1), torch.cat(scores, 1), out
        )


def _best_children(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    num_children: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int32 and log-probabilities float32, ``[num_rows, num_children]``."""
    values, token_ids = logits.topk(num_children, dim=-1)
    chunk = max(1, MAX_NORMALISED // logits.shape[1])
    parts = torch.split(logits, chunk)
    norms = [part.float().logsumexp(-1) for part in parts]
    return token_ids.int(), values.float() - torch.cat(norms)[:, None]


def _keep_best(
    token_ids: torch.Tensor,  # [num_reqs, num_places] int32
    parents: torch.Tensor,  # [num_reqs, num_places] int64, places, -1: the root
    scores: torch.Tensor,  # [num_reqs, num_places] float32
    out: DeviceCandidates,
) -> None:
    """The best places, best first. Path scores only fall from parent to child, and a
    parent's place is below its child's, so a stable order keeps parents in front."""
    num_reqs = token_ids.shape[0]
    width = min(out.token_ids.shape[1], token_ids.shape[1])
    # A broken draft costs speed only: what is not a number ranks last and is not used.
    scores = scores.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    rank_of = order.argsort(dim=1)
    best = order[:, :width]
    best_parents = parents.gather(1, best)
    parent_ranks = rank_of.gather(1, best_parents.clamp(min=0))
    out.token_ids[:num_reqs, :width] = token_ids.gather(1, best)
    out.parents[:num_reqs, :width] = torch.where(
        best_parents < 0, -1, parent_ranks
    ).int()
    out.scores[:num_reqs, :width] = ranked[:, :width]
    out.num_candidates[:num_reqs] = ranked[:, :width].isfinite().sum(1)


def _own_bits(masks: torch.Tensor) -> torch.Tensor:
    """``[max_num_nodes, words]`` int32, every node's own bit."""
    bits = torch.zeros_like(masks[0])
    for node in range(bits.shape[0]):
        # Bit 31 is the sign of an int32.
        bit = node % MASK_BITS
        bits[node, node // MASK_BITS] = 1 << bit if bit < MASK_BITS - 1 else -(1 << bit)
    return bits


def _rows(masks: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """``masks[req, nodes[req]]`` for every request."""
    return masks.gather(1, nodes[:, :, None].expand(-1, -1, masks.shape[2]))
