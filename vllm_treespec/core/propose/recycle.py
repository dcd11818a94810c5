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

from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.kernels.grow_paths import num_places
from vllm_treespec.kernels.recycling import BIN_WIDTH, NONE, NUM_BINS

NUM_PAIRS = 2**17
# Of a context's occurrences in a prompt; what more it holds would weigh 1/10 of the last.
MAX_AGE = 4
REFIT_EVERY = 16  # steps between two fits of the rates


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


class Rates:
    """How often a successor of a weight was right, by tokens' rows and by pairs'.

    Rates are measured per bin of the weight, made monotone (isotonic regression, so that
    no child overtakes its parent), and replace the weights (calibration by binning:
    Zadrozny and Elkan, 2002).
    """

    def __init__(self, kernels: KernelSet, device: torch.device) -> None:
        self._kernels = kernels
        self.right = torch.zeros(2, NUM_BINS, device=device)
        self.known = torch.zeros_like(self.right)
        # At first a weight is taken at its word.
        centres = -BIN_WIDTH * (torch.arange(NUM_BINS, device=device) + 0.5)
        self.knots = centres.repeat(2, 1)  # log-probabilities
        self._num_steps = 0

    def end_step(self) -> None:
        """Fit them anew every so many steps."""
        self._num_steps += 1
        if self._num_steps % REFIT_EVERY == 0:
            self._kernels.fit_rates(self.right, self.known, self.knots)


class Recycler:
    """Trees from the table, for as many requests as a batch holds."""

    def __init__(
        self,
        kernels: KernelSet,
        *,
        vocab_size: int,
        k: int,
        depth: int,
        max_nodes: int,
        max_num_reqs: int,
        device: torch.device,
    ) -> None:
        self._kernels = kernels
        self.table = Successors.allocate(vocab_size, k, device)
        self.depth = depth
        self.rates = Rates(kernels, device)
        width = num_places(depth, max_nodes)
        self._found = torch.zeros(max_num_reqs, width, dtype=torch.int32, device=device)
        self._zero = torch.zeros(1, 1, device=device)
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
        token_ids: torch.Tensor,  # [1 + num_tokens] int64, NONE: before it is nothing
    ) -> None:
        """Take what a prompt goes on with for what the target would have said."""
        before, parents, said = token_ids[:-2], token_ids[1:-1], token_ids[2:]
        if not said.shape[0]:
            return
        favourites = said[:, None]
        alike = self._zero.expand(favourites.shape)
        self._learn(Contexts(before, parents), favourites, alike, said, MAX_AGE)

    def learn_nodes(
        self,
        contexts: Contexts,  # [num_nodes], the nodes' tokens, NONE: padding
        logits: torch.Tensor,  # [num_nodes, vocab_size], the target's
        picks: torch.Tensor,  # [num_nodes] int64, what the target said at nodes that it
        # went along with, NONE: elsewhere
    ) -> None:
        """Keep the best of the target's logits at every verified node."""
        k = self.table.token_ids.shape[1]
        best = logits.topk(min(k, logits.shape[1]), dim=1)
        self._learn(contexts, best.indices, best.values, picks, max_age=1)

    def _learn(
        self,
        contexts: Contexts,
        best_ids: torch.Tensor,  # [num_contexts, n] int64, best first
        best_values: torch.Tensor,  # [num_contexts, n] float
        picks: torch.Tensor,  # [num_contexts] int64
        max_age: int,
    ) -> None:
        table, shape = self.table, best_ids.shape
        keys = picks.new_empty(2 * shape[0], dtype=torch.int64)
        successors = picks.new_empty(shape, dtype=torch.int32)
        weights = picks.new_empty(shape, dtype=torch.float32)
        self._kernels.weigh_successors(
            *contexts,
            best_ids,
            best_values,
            picks,
            table.vocab_size,
            table.owners.shape[0],
            keys,
            successors,
            weights,
        )
        self._kernels.blend_successors(
            *keys.sort(),
            *contexts,
            successors,
            weights,
            table.vocab_size,
            table.owners,
            table.token_ids,
            table.weights,
            max_age,
        )

    def learn_rates(
        self,
        roots: Contexts,  # [num_reqs], that trees were rooted at
        emitted: torch.Tensor,  # [num_reqs, max_emitted] int64, what the target said
        num_emitted: torch.Tensor,  # [num_reqs] int32, columns past it are stale
    ) -> None:
        """Compare what the target said with the table, before it learns from that."""
        table, rates = self.table, self.rates
        self._kernels.learn_rates(
            *roots,
            emitted,
            num_emitted,
            table.vocab_size,
            table.owners,
            table.token_ids,
            table.weights,
            self.depth,
            rates.right,
            rates.known,
        )
        rates.end_step()

    def grow(
        self,
        roots: Contexts,  # [num_reqs], the newest tokens
        active: torch.Tensor,  # [num_reqs] int32 or bool, 0: no candidates
        out: DeviceCandidates,
    ) -> None:
        """Write every request's likeliest paths, best first."""
        table = self.table
        self._kernels.grow_paths(
            *roots,
            active,
            table.vocab_size,
            table.owners,
            table.token_ids,
            table.weights,
            self.rates.knots,
            self.depth,
            self._found,
            out.token_ids,
            out.parents,
            out.scores,
            out.num_candidates,
        )
