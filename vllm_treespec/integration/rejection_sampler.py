"""Verify where vLLM would run its chain rejection sampler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_treespec.core.observe import StepCounts, count_step
from vllm_treespec.core.verify.target_walk import AcceptedPaths, cut_paths, walk_target
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
        counts = speculator.allocate_counts(input_batch.num_reqs)
        # None, or the most top tokens and the most tokens of choice per request.
        logprobs_dims = sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        # In parts, because of float32 copies of the logits: none outlives its part.
        parts = [
            self._verify_part(
                logits[rows],
                batch,
                requests,
                counts,
                None if invalid_drafts is None else invalid_drafts[rows],
                logprobs_dims,
            )
            for rows, requests, batch in _parts(logits, input_batch)
        ]
        sampled, num_sampled = (
            each[0] if len(parts) == 1 else torch.cat(each)
            for each in list(zip(*parts, strict=True))[:2]
        )
        speculator.verified(input_batch, logits, sampled, num_sampled, counts)
        if num_nans is not None:
            num_nans = sum_on_paths(num_nans, input_batch, speculator.paths)
        logprobs = None
        if parts[0][2] is not None:
            logprobs = LogprobsTensors.cat(
                [each[2] for each in parts], input_batch.cu_num_logits_np.tolist()
            )
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_sampled,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
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

    def _verify_part(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size], of these requests
        input_batch: Any,  # of these requests
        requests: slice,  # which of the whole batch they are
        counts: StepCounts,  # of the whole batch, written
        invalid_drafts: torch.Tensor | None,  # [num_logits] bool
        logprobs_dims: tuple[int, int] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Emitted tokens ``[num_reqs, max_num_nodes]`` int64, their number ``[num_reqs]``
        int32, and log-probs, if wanted. Writes the paths."""
        sampler, speculator = self._sampler, self._speculator
        paths, counts = (
            speculator.paths.of(requests),
            StepCounts(counts.counts[requests]),
        )
        processed = (
            logprobs_dims is not None
            and sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        )
        slots, cu_num_logits = input_batch.idx_mapping, input_batch.cu_num_logits
        drafts, num_drawn, scored_logits = speculator.sampled, 0, logits
        if drafts is not None:
            num_drawn = drafts.num_placed(input_batch.idx_mapping_np.tolist())
        if num_drawn < input_batch.num_reqs:
            target_ids, sampled_from = sampler.sample(
                *_arguments(logits, input_batch), return_logprobs=processed
            )
            scored_logits = sampled_from if processed else logits
            del sampled_from
            sampled, num_sampled = walk_target(
                speculator.kernels,
                speculator.trees,
                paths,
                slots,
                cu_num_logits,
                target_ids,
                counts.counts,
            )
        else:  # the target's own picks would decide nothing
            num_sampled = torch.zeros_like(slots, dtype=torch.int32)
            sampled = torch.zeros_like(paths.nodes[: len(slots)].long())
        if drafts is not None and num_drawn > 0:
            scored_logits = logits  # of float32 copies there is one at a time
            scored_logits = sampler.apply_sampling_params(
                *_arguments(logits, input_batch)
            ).float()
            drafts.verify(
                speculator.kernels,
                speculator.trees,
                paths,
                slots,
                cu_num_logits,
                scored_logits,
                speculator.batch.root_positions[requests].long(),
                sampled,
                num_sampled,
            )
        if invalid_drafts is not None:
            cut_paths(paths, sampled, num_sampled, cu_num_logits, invalid_drafts)
        if num_drawn > 0 or invalid_drafts is not None:  # paths have changed
            count_step(
                speculator.kernels,
                speculator.trees,
                paths,
                slots,
                cu_num_logits,
                counts,
            )
        if logprobs_dims is None:
            return sampled, num_sampled, None
        logprobs = self._score_paths(
            scored_logits if processed else logits,
            sampled,
            input_batch,
            paths,
            *logprobs_dims,
        )
        return sampled, num_sampled, logprobs

    def _score_paths(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        sampled: torch.Tensor,  # [num_reqs, max_num_nodes] int64
        input_batch: Any,
        paths: AcceptedPaths,
        num_logprobs: int,
        max_num_token_ids: int,
    ) -> Any:
        """Log-probs of the emitted tokens, in the layout of a chain.

        vLLM reads the first ``num_sampled`` rows of each request, so the rows of the
        accepted path are put there; the rest repeat the root and are never read.
        """
        batch_rows, rows = path_rows(input_batch, paths)
        return compute_topk_scores(
            logits[rows],
            num_logprobs,
            sampled[batch_rows, input_batch.expanded_local_pos.long()],
            logprob_token_ids_state=self._sampler.logprob_token_ids_state,
            expanded_idx_mapping=input_batch.expanded_idx_mapping,
            max_per_req_token_ids=max_num_token_ids,
            logits_mode=self._sampler.logprobs_mode
            in ("raw_logits", "processed_logits"),
        )


def _parts(
    logits: torch.Tensor, input_batch: Any
) -> Iterator[tuple[slice, slice, Any]]:
    """Logits rows, requests and batch of some requests at a time, as many as vLLM
    samples at once."""
    num_reqs, cu_num_logits = input_batch.num_reqs, input_batch.cu_num_logits_np
    for first, last in _chunks(cu_num_logits, get_max_chunk_logits(logits.shape[1])):
        requests = slice(first, last)
        rows = slice(int(cu_num_logits[first]), int(cu_num_logits[last]))
        if last - first == num_reqs:
            yield rows, requests, input_batch
            return
        bounds = slice(first, last + 1)
        yield (
            rows,
            requests,
            replace(
                input_batch,
                num_reqs=last - first,
                idx_mapping=input_batch.idx_mapping[requests],
                idx_mapping_np=input_batch.idx_mapping_np[requests],
                expanded_idx_mapping=input_batch.expanded_idx_mapping[rows],
                expanded_local_pos=input_batch.expanded_local_pos[rows],
                seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound[requests],
                logits_indices=input_batch.logits_indices[rows],
                cu_num_logits=input_batch.cu_num_logits[bounds] - rows.start,
                cu_num_logits_np=cu_num_logits[bounds] - rows.start,
            ),
        )


def _arguments(logits: torch.Tensor, input_batch: Any) -> tuple[Any, ...]:
    """What vLLM's sampler is called with."""
    rows, num_reqs = input_batch.logits_indices, input_batch.num_reqs
    return (
        logits,
        input_batch.expanded_idx_mapping,
        input_batch.idx_mapping,
        input_batch.idx_mapping_np,
        input_batch.positions[rows],
        input_batch.input_ids[rows],
        input_batch.expanded_local_pos,
        input_batch.seq_lens_cpu_upper_bound.numpy()[:num_reqs],
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
