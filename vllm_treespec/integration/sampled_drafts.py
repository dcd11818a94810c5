"""Which requests draw their children from the draft model, and what they drew from."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.propose.draft_tree import TreeGrower
from vllm_treespec.core.propose.drawing import Drawing
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.draws import DrawnRule, Draws
from vllm_treespec.core.verify.recursive_rejection import walk_without_replacement
from vllm_treespec.core.verify.target_walk import AcceptedPaths
from vllm_treespec.core.verify.traversal import walk_traversal

RULES: dict[str, DrawnRule] = {
    "without_replacement": walk_without_replacement,
    "traversal": walk_traversal,
}


class SampledDrafts:
    """Gives sampled requests a block for the draft's distributions, while there are
    any, and says after each build which nodes were drawn from which of them."""

    def __init__(
        self,
        config: TreeSpecConfig,
        vllm_config: VllmConfig,
        kernels: KernelSet,
        *,
        max_num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            max_num_rows: nodes of a tree that the draft runs on, the root included.
            dtype: of the draft's logits.
        """
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        vocab_size = vllm_config.model_config.get_vocab_size()
        block_bytes = max_num_rows * vocab_size * dtype.itemsize
        num_blocks = min(
            max_num_reqs, int(config.draft_logits_gib * 2**30 // block_bytes)
        )
        self._max_num_rows = max_num_rows
        self._free = list(range(num_blocks))
        self._blocks: dict[int, int] = {}  # request slot -> its block
        self._placed: set[int] = set()  # slots whose waiting tree was drawn
        self._spare = num_blocks
        self.drawing = Drawing.allocate(
            kernels,
            max_num_reqs=max_num_reqs,
            num_blocks=num_blocks + 1,
            max_num_nodes=max_num_rows,
            vocab_size=vocab_size,
            dtype=dtype,
            device=device,
        )
        self._block_of = torch.full(
            (max_num_reqs,), self._spare, dtype=torch.int64, device=device
        )
        self._mixes = config.draw == "mixed"
        self._rule = RULES[config.rule]
        max_num_nodes = config.num_speculative_tokens + 1
        self._paths = AcceptedPaths.allocate(max_num_reqs, max_num_nodes, device)
        drawn = torch.zeros(
            max_num_reqs, max_num_nodes, dtype=torch.int32, device=device
        )
        self.draws = Draws(
            draft_logits=self.drawing.logits,
            sources=torch.full_like(drawn, -1),
            drawn=drawn,
            temperatures=torch.ones(max_num_reqs, device=device),
            seeds=torch.zeros(max_num_reqs, dtype=torch.int64, device=device),
        )

    def add_request(self, slot: int) -> None:
        """Let the request draw, if a block is left for it."""
        if self._free:
            self._blocks[slot] = self._free.pop()
            self._block_of[slot].fill_(self._blocks[slot])

    def remove_request(self, slot: int) -> None:
        self.draws.sources[slot] = -1
        self.draws.drawn[slot] = 0
        self._placed.discard(slot)
        block = self._blocks.pop(slot, None)
        if block is not None:
            self._free.append(block)
            self._block_of[slot].fill_(self._spare)

    def any_of(self, slots: list[int]) -> bool:
        """Whether one of these requests draws."""
        return any(slot in self._blocks for slot in slots)

    def num_placed(self, slots: list[int]) -> int:
        """How many of these requests' waiting trees were drawn."""
        return sum(slot in self._placed for slot in slots)

    def prepare(
        self,
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        temperatures: torch.Tensor,  # [max_num_reqs] float32, by slot
        seeds: torch.Tensor,  # [max_num_reqs] int64, by slot
    ) -> None:
        """Line the requests up with the batch, before the draft grows their trees."""
        rows, drawing = slice(slots.shape[0]), self.drawing
        blocks = self._block_of[slots]
        is_drawn = blocks != self._spare
        drawing.is_drawn.zero_()
        drawing.is_drawn[rows] = is_drawn
        drawing.is_mixed.zero_()
        drawing.is_mixed[rows] = is_drawn & self._mixes
        drawing.temperatures[rows] = torch.where(is_drawn, temperatures[slots], 1.0)
        drawing.seeds[rows] = seeds[slots]
        self.draws.temperatures[slots] = drawing.temperatures[rows]
        self.draws.seeds[slots] = drawing.seeds[rows]
        drawing.blocks.fill_(self._spare * self._max_num_rows)
        drawing.blocks[rows] = blocks * self._max_num_rows

    def place(
        self,
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        candidates: DeviceCandidates,  # the draft's
        grower: TreeGrower,  # which has just grown them
        slot_list: list[int],  # the slots, on the host
    ) -> None:
        """Say what the slots' new trees were drawn from.

        The candidates of requests that draw are the first of the merged ones and cost
        nothing, so the builder has put them first, in their order: candidate ``c`` is
        node ``c + 1``.
        """
        num_reqs = slots.shape[0]
        self._placed.difference_update(slot_list)
        self._placed.update(slot for slot in slot_list if slot in self._blocks)
        draws, drawing = self.draws, self.drawing
        max_num_nodes = draws.drawn.shape[1]
        width = min(grower.num_candidates, max_num_nodes - 1)
        counts = candidates.num_candidates[:num_reqs, None]
        columns = torch.arange(max_num_nodes, device=slots.device)
        is_drawn = drawing.is_drawn[:num_reqs, None] & (columns <= counts)
        rows = torch.full_like(is_drawn, -1, dtype=torch.int32)
        rows[:, 0] = 0
        rows[:, 1 : width + 1] = grower.nodes[:num_reqs, :width]
        sources = drawing.blocks[:num_reqs, None] + rows
        draws.sources[slots] = torch.where(is_drawn & (rows >= 0), sources, -1).int()
        is_drawn[:, 1 : width + 1] &= grower.drawn[:num_reqs, :width]
        draws.drawn[slots] = (is_drawn & (columns > 0)).int()

    def verify(
        self,
        kernels: KernelSet,
        trees: TreeBuffers,
        paths: AcceptedPaths,  # rows that drew are overwritten
        slots: torch.Tensor,  # [num_reqs] int64, batch row -> request slot
        cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32
        target_logits: torch.Tensor,  # [num_logits, vocab_size] float32, processed
        positions: torch.Tensor,  # [num_reqs] int64, of the roots
        sampled: torch.Tensor,  # [num_reqs, max_num_nodes] int64, rows overwritten
        num_sampled: torch.Tensor,  # [num_reqs] int32, rows overwritten
    ) -> None:
        """Let the rule decide for the requests whose trees were drawn."""
        by_rule = self._rule(
            kernels,
            trees,
            self.draws,
            self._paths,
            slots,
            cu_num_logits,
            target_logits,
            positions,
        )
        num_reqs = slots.shape[0]
        is_drawn = self.draws.sources[slots, 0] >= 0
        for target, source in (
            (sampled, by_rule[0]),
            (num_sampled, by_rule[1]),
            (paths.nodes[:num_reqs], self._paths.nodes[:num_reqs]),
            (paths.lengths[:num_reqs], self._paths.lengths[:num_reqs]),
        ):
            mask = is_drawn[:, None] if target.dim() == 2 else is_drawn
            target.copy_(torch.where(mask, source, target))

    def reset(self, slots: torch.Tensor, slot_list: list[int]) -> None:
        """Nothing was drawn for these slots' new trees."""
        self._placed.difference_update(slot_list)
        self.draws.sources[slots] = -1
        self.draws.drawn[slots] = 0
