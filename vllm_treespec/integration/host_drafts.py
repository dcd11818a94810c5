"""Proposers that draft on the host, and the text of every request that they look at."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig

from vllm_treespec.config import HostedConfig, TreeSpecConfig, max_candidates
from vllm_treespec.core.build import TreeBuilder
from vllm_treespec.core.history import TokenHistory
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.propose import DecodeStep, Proposer
from vllm_treespec.core.propose.pool import ProposerPool
from vllm_treespec.core.propose.suffix import SuffixProposer
from vllm_treespec.core.schedule import num_offered
from vllm_treespec.core.transfer import HostCopy
from vllm_treespec.integration.worth import Worth

NOBODY = -1  # in place of a slot whose request has left


class HostDrafts:
    """Drafts once a step: ``fetch_sampled``, then ``draft``, then ``learn``.

    What the device does between the first two runs beside the copy. Only who drafts
    waits for it: text that nobody looks at yet is appended when it has come.
    """

    def __init__(
        self,
        proposers: Sequence[Proposer],  # of the first rank, none on the others
        config: TreeSpecConfig,
        vllm_config: VllmConfig,
        *,
        kernels: KernelSet,
        ranks: Any,
        req_states: Any,
    ) -> None:
        self._indices = [
            index
            for index, each in enumerate(config.proposers)
            if isinstance(each, HostedConfig)
        ]
        self.pool = ProposerPool(
            proposers,
            max_candidates=config.max_candidates,
            vocab_size=vllm_config.model_config.get_vocab_size(),
            timeout=config.draft_timeout_ms / 1e3,
        )
        self._history = TokenHistory.allocate(
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
        )
        self._suffix = [each for each in proposers if isinstance(each, SuffixProposer)]
        # Per proposer: requests it was asked about, and those that it had something for.
        self.lookups = np.zeros(len(self._indices))
        self.hits = np.zeros(len(self._indices))
        self._ranks = ranks
        self._req_states = req_states
        self._kernels = kernels
        self._num_proposers = len(config.proposers)
        self._max_new = config.num_speculative_tokens + 1
        # Steps' new tokens that are not in the history yet, oldest first: slots, copy.
        self._awaited: deque[tuple[npt.NDArray[np.int32], HostCopy]] = deque()
        # Who has made the host wait in this step, and when the tokens had come.
        self._waited: list[int] = []
        self._resumed = 0.0

    def add_request(
        self,
        slot: int,
        token_ids: Sequence[int],
        namespace: int,
        *,
        is_remembered: bool,
    ) -> None:
        self.pool.settle()
        self._append_arrived()
        for slots, _ in self._awaited:  # of a request that has left the slot
            slots[slots == slot] = NOBODY
        self.pool.add_request(slot)
        for each in self._suffix:
            each.keep_apart(slot, namespace, is_remembered=is_remembered)
        self._history.start(slot, token_ids)

    def remove_request(self, slot: int) -> None:
        self.pool.remove_request(slot)

    def fetch_sampled(
        self,
        slots: torch.Tensor,  # [num_reqs] int64
        slots_np: npt.NDArray[np.int32],
        num_sampled: torch.Tensor,  # [num_reqs] int32
    ) -> None:
        """Start copying the new tokens to the host, ahead of the draft models' work."""
        states = self._req_states
        newest = torch.empty(
            len(slots), 1 + self._max_new, dtype=torch.int32, device=slots.device
        )
        self._kernels.newest_tokens(
            slots,
            num_sampled,
            states.all_token_ids.gpu,
            states.total_len.gpu,
            newest,
        )
        self._awaited.append((slots_np.copy(), HostCopy(newest)))

    def draft(
        self,
        slots: npt.NDArray[np.int32],  # [num_reqs], batch row -> request slot
        wanted: npt.NDArray[np.bool_],  # [num_proposers, num_reqs], whose drafts
        builder: TreeBuilder,
        worth: Worth,
        *,
        num_nodes: int,  # of any tree at most
    ) -> npt.NDArray[np.int32]:
        """Hand every proposer's candidates to the builder; returns nodes offered to
        each request at most."""
        self.pool.settle()
        drafting = [bool(wanted[index].any()) for index in self._indices]
        if self._ranks.world_size == 1:  # else the others do not know who was dismissed
            gone = self.pool.is_dismissed
            drafting = [each and not gone[n] for n, each in enumerate(drafting)]
        if not any(drafting):
            self._append_arrived()
            for index in self._indices:
                builder.forget(index, len(slots))
            return np.zeros(len(slots), np.int32)
        must_wait = not self._awaited[-1][1].has_arrived
        newest = self._append_all()
        asked = zip(self._indices, drafting, strict=True)
        self._waited = [index for index, each in asked if each and must_wait]
        self._resumed = time.perf_counter()
        width = max_candidates(self._num_proposers, num_nodes)
        candidates = self.pool.propose(self._step(slots, width), drafting)
        decodes = newest[:, 0] > 0
        for place, each in enumerate(candidates):  # of the first rank
            asked = wanted[self._indices[place]]
            each.num_candidates[~asked] = 0
            self.lookups[place] += np.count_nonzero(asked & decodes)
            self.hits[place] += np.count_nonzero((each.num_candidates > 0) & decodes)
        if self._ranks.world_size > 1:
            candidates = self._ranks.broadcast_object(candidates, src=0)
        for index, each in zip(self._indices, candidates, strict=True):
            builder.upload(index, each)
        for index, seconds in zip(self._indices, self.pool.seconds, strict=False):
            worth.stopwatch.add(index, seconds)  # known to the first rank only
        self._resumed += max(self.pool.seconds, default=0.0)  # those are theirs already
        return np.where(decodes, num_offered(candidates), 0)

    def end_stall(self, worth: Worth | None) -> None:
        """The device has its next work, and had none since the host stopped waiting for
        tokens: charge those who wanted them."""
        stall = time.perf_counter() - self._resumed
        if worth is not None:
            for index in self._waited:
                worth.stopwatch.add(index, stall / len(self._waited))
        self._waited = []

    @property
    def faulty(self) -> list[int]:
        """Proposers that failed; known to the first rank only."""
        dismissed = zip(self._indices, self.pool.is_dismissed, strict=False)
        return [index for index, is_dismissed in dismissed if is_dismissed]

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that the suffix proposer remembers."""
        return sum(each.num_cached_tokens for each in self._suffix)

    def learn(self, slots: npt.NDArray[np.int32]) -> None:
        """Index the new tokens, off the request path."""
        self.pool.learn(self._step(slots))

    def _append_arrived(self) -> None:
        while self._awaited and self._awaited[0][1].has_arrived:
            self._append_oldest()

    def _append_all(self) -> npt.NDArray[np.int32]:
        """This step's new tokens, once all are in the history; waits for them."""
        while True:
            newest = self._append_oldest()
            if not self._awaited:
                return newest

    def _append_oldest(self) -> npt.NDArray[np.int32]:
        slots, copy = self._awaited.popleft()
        newest = copy.wait()
        kept = slots != NOBODY
        self._history.append(slots[kept], newest[kept])
        return newest

    def _step(
        self, slots: npt.NDArray[np.int32], max_candidates: int | None = None
    ) -> DecodeStep:
        history = self._history
        return DecodeStep(slots, history.token_ids, history.num_tokens, max_candidates)
