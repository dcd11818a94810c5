"""Children drawn from the draft's own distribution.

Rejection rules accept more than walking does, if a node's children were sampled from
the draft's distribution ``q`` at the request's temperature, and if what is kept of them
was decided before they were drawn: choosing among drawn children would bias them.

Either all children are drawn, without replacement; or a node *mixes*: its likeliest
children are fixed, and one more is drawn from what they leave of ``q``. How likely the
draft says that somebody else than the fixed ones comes next is known before that draw,
so trees that mix may keep the likeliest of their nodes. (Sampling only the last child:
arXiv:2502.18779, with other rules of verification.)

Gumbel noise on the logits turns the best k into k draws without replacement (Kool et
al., arXiv:1903.06059). It depends on the request's seed, the position and the node, and
not on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_treespec.core.kernel_set import KernelSet

# Keys of fixed children, above any logit with its noise.
FIRST = 1e30
# What fixed children leave of a probability of 1 at least, as float32 resolves it.
LEAST_REST = 1e-7


@dataclass(frozen=True, slots=True)
class Drawing:
    """Which rows of this batch draw, how and at which temperature, and where what they
    draw from is kept until the target has spoken."""

    kernels: KernelSet
    is_drawn: torch.Tensor  # [max_num_reqs] bool
    is_mixed: torch.Tensor  # [max_num_reqs] bool, of the drawn: all but one are fixed
    temperatures: torch.Tensor  # [max_num_reqs] float32, 1 where nothing is drawn
    seeds: torch.Tensor  # [max_num_reqs] int64
    # [max_num_reqs] int64, first row of ``logits``; the spare block where not drawn.
    blocks: torch.Tensor
    logits: torch.Tensor  # [num_blocks * max_num_nodes, vocab_size], draft's type

    @classmethod
    def allocate(
        cls,
        kernels: KernelSet,
        *,
        max_num_reqs: int,
        num_blocks: int,
        max_num_nodes: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Drawing:
        """Nothing is drawn until the rows say so. ``num_blocks`` counts the spare."""

        def zeros(kind: torch.dtype) -> torch.Tensor:
            return torch.zeros(max_num_reqs, dtype=kind, device=device)

        return cls(
            kernels,
            is_drawn=zeros(torch.bool),
            is_mixed=zeros(torch.bool),
            temperatures=zeros(torch.float32) + 1,
            seeds=zeros(torch.int64),
            blocks=zeros(torch.int64),
            # A draft may know fewer tokens than the target: those it never draws.
            logits=torch.full(
                (num_blocks * max_num_nodes, vocab_size),
                -torch.inf,
                dtype=dtype,
                device=device,
            ),
        )

    def perturb(
        self,
        logits: torch.Tensor,  # [num_reqs * num_rows, vocab_size]
        first_node: int,
        positions: torch.Tensor,  # [num_reqs] int32, of these rows
        num_fixed: int,  # likeliest children of a node that mixes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what these rows' children are drawn from; returns their logits, and the
        keys whose best are the children, fixed ones first.

        Both ``[num_reqs * num_rows, vocab_size]``, the latter float32; where nothing is
        drawn it is the logits.
        """
        num_reqs = positions.shape[0]
        nodes = first_node + torch.arange(
            logits.shape[0] // num_reqs, device=logits.device
        )
        places = (self.blocks[:num_reqs, None] + nodes).view(-1)
        # What is drawn from is what is kept, rounding included.
        logits = logits.to(self.logits.dtype)
        is_mixed = self._mixed_rows(logits.shape[0], num_reqs)
        fixed = logits.topk(num_fixed, dim=1).indices
        rest = logits.scatter(
            1, fixed, torch.where(is_mixed, -torch.inf, logits.gather(1, fixed))
        )
        self.logits[places, : rest.shape[1]] = rest
        keys = torch.empty_like(rest, dtype=torch.float32)
        self.kernels.perturb_logits(
            rest,
            self.temperatures,
            self.seeds,
            positions,
            self.is_drawn,
            first_node,
            keys,
        )
        first = torch.arange(num_fixed, 0, -1, device=keys.device) * FIRST
        keys.scatter_(1, fixed, torch.where(is_mixed, first, keys.gather(1, fixed)))
        return logits, keys

    def score(
        self,
        log_probs: torch.Tensor,  # [num_reqs * num_rows, num_children] float32
        num_reqs: int,
        num_fixed: int,
    ) -> torch.Tensor:
        """The children's log-probabilities, with no regard to which token was drawn
        where a node mixes: that one has what the fixed ones leave."""
        fixed = log_probs[:, :num_fixed]
        rest = (1 - fixed.exp().sum(1, keepdim=True)).clamp(min=LEAST_REST).log()
        mixed = torch.full_like(log_probs, -torch.inf)
        mixed[:, : num_fixed + 1] = torch.cat([fixed, rest], 1)
        is_mixed = self._mixed_rows(log_probs.shape[0], num_reqs)
        return torch.where(is_mixed, mixed, log_probs)

    def all_drawn(self, num_reqs: int) -> torch.Tensor:
        """``[num_reqs, 1]`` bool, requests that draw and do not mix."""
        return (self.is_drawn & ~self.is_mixed)[:num_reqs, None]

    def _mixed_rows(self, num_rows: int, num_reqs: int) -> torch.Tensor:
        """``[num_rows, 1]`` bool."""
        each = num_rows // num_reqs
        is_mixed = self.is_mixed[:num_reqs]
        return is_mixed.repeat_interleave(each, output_size=num_rows)[:, None]
