"""Verify where vLLM would run its chain rejection sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_treespec.core.observe import count_step
from vllm_treespec.core.verify.target_walk import cut_paths, walk_target
from vllm_treespec.integration.metrics import VERIFY
from vllm_treespec.integration.node_rows import path_rows, sum_on_paths

if TYPE_CHECKING:
    from vllm_treespec.integration.speculator import TreeSpeculator


class TreeRejectionSampler:
    """Samples the target at every node with vLLM's own sampler, then walks the tree.

    vLLM keys its noise by (seed, position), and a node's position is its depth's, so a
    pick is the very one that decoding token by token would have made.
    """

    enable_adaptive_verification = False  # read by vLLM's warm-up

    def __init__(self, sampler: Any, speculator: TreeSpeculator) -> None:
        self._sampler = sampler
        self._speculator = speculator

    def __call__(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size], one row per node
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,  # [num_logits] bool
    ) -> SamplerOutput:
        with self._speculator.phases.measure(VERIFY):
            return self._verify(logits, input_batch, invalid_drafts)

    def _verify(
        self,
        logits: torch.Tensor,
        input_batch: Any,
        invalid_drafts: torch.Tensor | None,
    ) -> SamplerOutput:
        sampler, speculator = self._sampler, self._speculator
        num_nans = get_num_nans(logits) if sampler.compute_nans else None
        # None, or the most top tokens and the most tokens of choice per request.
        logprobs_dims = sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        wants_logprobs = logprobs_dims is not None
        processed = wants_logprobs and sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        slots, cu_num_logits = input_batch.idx_mapping, input_batch.cu_num_logits
        drafts, num_drawn, scored_logits = speculator.sampled, 0, logits
        if drafts is not None:
            num_drawn = drafts.num_placed(input_batch.idx_mapping_np.tolist())
        counts = speculator.allocate_counts(input_batch.num_reqs)
        if num_drawn < input_batch.num_reqs:
            target_ids, scored_logits = self._sample(
                logits, input_batch, wants_logprobs
            )
            sampled, num_sampled = walk_target(
                speculator.kernels,
                speculator.trees,
                speculator.paths,
                slots,
                cu_num_logits,
                target_ids,
                counts.counts,
            )
        else:  # the target's own picks would decide nothing
            num_sampled = torch.zeros_like(slots, dtype=torch.int32)
            sampled = torch.zeros_like(speculator.paths.nodes[: len(slots)].long())
        if drafts is not None and num_drawn > 0:
            scored_logits = self._process(logits, input_batch)
            drafts.verify(
                speculator.kernels,
                speculator.trees,
                speculator.paths,
                slots,
                cu_num_logits,
                scored_logits,
                speculator.batch.root_positions[: len(slots)].long(),
                sampled,
                num_sampled,
            )
        if invalid_drafts is not None:
            cut_paths(
                speculator.paths, sampled, num_sampled, cu_num_logits, invalid_drafts
            )
        if num_drawn > 0 or invalid_drafts is not None:  # paths have changed
            count_step(
                speculator.kernels,
                speculator.trees,
                speculator.paths,
                slots,
                cu_num_logits,
                counts,
            )
        speculator.verified(input_batch, logits, sampled, num_sampled, counts)
        if num_nans is not None:
            num_nans = sum_on_paths(num_nans, input_batch, speculator.paths)
        logprobs = None
        if logprobs_dims is not None:
            logprobs = self._score_paths(
                scored_logits if processed else logits,
                sampled,
                input_batch,
                *logprobs_dims,
            )
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_sampled,
            input_batch.seq_lens,
            cu_num_logits,
            input_batch.idx_mapping,
            sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _sample(
        self, logits: torch.Tensor, input_batch: Any, wants_logprobs: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's pick ``[num_logits]`` int64 and processed logits per node.

        In chunks of requests, because the sampler copies its logits to float32.
        """
        parts = [
            self._sampler.sample(*arguments, return_logprobs=wants_logprobs)
            for arguments in _chunks_of(logits, input_batch)
        ]
        if len(parts) == 1:
            return parts[0]  # type: ignore[no-any-return]
        picks, processed = zip(*parts, strict=True)
        return torch.cat(picks), torch.cat(processed) if wants_logprobs else logits

    def _process(self, logits: torch.Tensor, input_batch: Any) -> torch.Tensor:
        """What the target samples from at every node: ``[num_logits, vocab_size]``
        float32, after all request options."""
        parts = [
            self._sampler.apply_sampling_params(*arguments)
            for arguments in _chunks_of(logits, input_batch)
        ]
        processed: torch.Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return processed.float()

    def _score_paths(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        sampled: torch.Tensor,  # [num_reqs, max_num_nodes] int64
        input_batch: Any,
        num_logprobs: int,
        max_num_token_ids: int,
    ) -> Any:
        """Log-probs of the emitted tokens, in the layout of a chain.

        vLLM reads the first ``num_sampled`` rows of each request, so the rows of the
        accepted path are put there; the rest repeat the root and are never read.
        """
        batch_rows, rows = path_rows(input_batch, self._speculator.paths)
        return compute_topk_scores(
            logits[rows],
            num_logprobs,
            sampled[batch_rows, input_batch.expanded_local_pos.long()],
            input_batch.cu_num_logits_np.tolist(),
            logprob_token_ids_state=self._sampler.logprob_token_ids_state,
            expanded_idx_mapping=input_batch.expanded_idx_mapping,
            max_per_req_token_ids=max_num_token_ids,
            logits_mode=self._sampler.logprobs_mode
            in ("raw_logits", "processed_logits"),
        )


def _chunks_of(logits: torch.Tensor, input_batch: Any) -> Iterator[tuple[Any, ...]]:
    """What vLLM's sampler is called with, some requests at a time."""
    rows = input_batch.logits_indices
    positions = input_batch.positions[rows]
    input_ids = input_batch.input_ids[rows]
    seq_lens = input_batch.seq_lens_cpu_upper_bound.numpy()
    cu_num_logits = input_batch.cu_num_logits_np
    for first, last in _chunks(cu_num_logits, get_max_chunk_logits(logits.shape[1])):
        chunk = slice(int(cu_num_logits[first]), int(cu_num_logits[last]))
        yield (
            logits[chunk],
            input_batch.expanded_idx_mapping[chunk],
            input_batch.idx_mapping[first:last],
            input_batch.idx_mapping_np[first:last],
            positions[chunk],
            input_ids[chunk],
            input_batch.expanded_local_pos[chunk],
            seq_lens[first:last],
        )


def _chunks(cu_num_logits: np.ndarray, max_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of requests with at most ``max_rows`` rows, never splitting a request."""
    num_reqs = len(cu_num_logits) - 1
    first = 0
    while first < num_reqs:
        limit = cu_num_logits[first] + max_rows
        last = int(np.searchsorted(cu_num_logits, limit, side="right")) - 1
        last = min(num_reqs, max(first + 1, last))
        yield first, last
        first = last
