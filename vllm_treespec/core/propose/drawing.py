"""Children drawn from the draft's own distribution, without replacement.

Rejection rules accept more than walking does, if a node's children were sampled from
the draft's distribution ``q`` at the request's temperature, and if what is kept of them
was decided before they were drawn: choosing among drawn children would bias them.

Gumbel noise on the logits turns the best k into k draws without replacement (Kool et
al., arXiv:1903.06059). It depends on the request's seed, the position and the node, and
not on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_treespec.core.kernel_set import KernelSet


@dataclass(frozen=True, slots=True)
class Drawing:
    """Which rows of this batch draw, at which temperature, and where their distributions
    are kept until the target has spoken."""

    kernels: KernelSet
    is_drawn: torch.Tensor  # [max_num_reqs] bool
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the rows' logits; returns them, and with noise on top what decides who
        is drawn.

        Both ``[num_reqs * num_rows, vocab_size]``, the latter float32; where nothing is
        drawn it has no noise.
        """
        num_reqs = positions.shape[0]
        nodes = first_node + torch.arange(
            logits.shape[0] // num_reqs, device=logits.device
        )
        places = (self.blocks[:num_reqs, None] + nodes).view(-1)
        # What is drawn from is what is kept, rounding included.
        logits = logits.to(self.logits.dtype)
        self.logits[places, : logits.shape[1]] = logits
        noisy = torch.empty_like(logits, dtype=torch.float32)
        self.kernels.perturb_logits(
            logits,
            self.temperatures,
            self.seeds,
            positions,
            self.is_drawn,
            first_node,
            noisy,
        )
        return logits, noisy
