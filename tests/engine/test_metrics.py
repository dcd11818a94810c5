"""What the engine's metrics say, against what its rejection sampler saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.metrics.loggers import LoggingStatLogger

from vllm_treespec.integration.metrics import TreeLogLine
from vllm_treespec.integration.rejection_sampler import TreeRejectionSampler
from vllm_treespec.integration.speculator import TreeSpeculator
from vllm_treespec.integration.worth import Worth

K = 8  # nodes per tree


@dataclass
class Seen:
    """Of every verified tree its nodes, and how many of them were accepted."""

    sizes: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_rows: int = 0  # scheduled for drafts
    num_decoded: int = 0  # requests times steps, prefills excluded

    def verified(self, sampler: Any, input_batch: Any) -> None:
        trees, paths = sampler._speculator.trees, sampler._speculator.paths
        ends, slots = input_batch.cu_num_logits.tolist(), input_batch.idx_mapping
        for row, slot in enumerate(slots[: input_batch.num_reqs].tolist()):
            scheduled = ends[row + 1] - ends[row] - 1
            self.num_rows += scheduled
            size = min(int(trees.num_nodes[slot]) - 1, scheduled)
            if size > 0:
                self.sizes.append(size)
                self.lengths.append(int(paths.lengths[row]))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    log = Seen()
    verify, propose = TreeRejectionSampler.__call__, TreeSpeculator.propose

    def verify_and_log(self: Any, logits: Any, input_batch: Any, *rest: Any) -> Any:
        result = verify(self, logits, input_batch, *rest)
        log.verified(self, input_batch)
        return result

    def propose_and_log(self: Any, input_batch: Any, *rest: Any, **more: Any) -> Any:
        log.num_decoded += int((~input_batch.is_prefilling_np).sum())
        return propose(self, input_batch, *rest, **more)

    monkeypatch.setattr(TreeRejectionSampler, "__call__", verify_and_log)
    monkeypatch.setattr(TreeSpeculator, "propose", propose_and_log)
    return log


class Readings:
    """``LLM.get_metrics()`` of an engine, by name."""

    def __init__(self, engine: Any) -> None:
        self._metrics = engine.llm.get_metrics()

    def named(self, name: str) -> list[Any]:
        found = [each for each in self._metrics if each.name == f"vllm:{name}"]
        assert found, f"no series {name}"
        for each in found:
            assert each.labels["engine"] == "0" and each.labels["model_name"]
        return found

    def one(self, name: str) -> Any:
        (metric,) = self.named(name)
        return metric

    def by(self, label: str, name: str) -> dict[str, int]:
        return {each.labels[label]: each.value for each in self.named(name)}


def generate(engine: Any, prompts: list[list[int]], max_tokens: int = 24) -> list[Any]:
    return engine.llm.generate(  # type: ignore[no-any-return]
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=max_tokens, temperature=0.0, detokenize=False),
        use_tqdm=False,
    )


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_series_agree_with_the_engine_and_each_other(
    async_scheduling, model_path, draft_path, prompts, start, seen
):
    # Neither fills a tree.
    draft = {
        "type": "draft_model",
        "model": draft_path("llama"),
        "shape": "static",
        "branching": [2, 1],
    }
    suffix = {"type": "suffix", "min_log_prob": -2.0}
    engine = start(
        model_path("llama"),
        tree={"proposers": [draft, suffix]},
        num_speculative_tokens=K,
        async_scheduling=async_scheduling,
        per_request_spec_decode_metrics="summary",
    )
    # The second time, everything was seen before.
    outputs = [*generate(engine, prompts(4)), *generate(engine, prompts(4))]
    readings = Readings(engine)
    lengths = readings.one("treespec_acceptance_length")
    sizes = readings.one("treespec_tree_size")
    assert lengths.count == sizes.count
    accepted = lengths.sum - lengths.count
    num_nodes = readings.one("treespec_nodes_verified").value
    assert sizes.sum == num_nodes
    assert 0 < sizes.buckets["4.0"] < sizes.count  # small trees and large ones

    by_proposer = [
        readings.by("proposer", f"treespec_{name}")
        for name in ("exclusively_accepted_nodes", "accepted_nodes", "drafted_nodes")
    ]
    for name in ("draft_model", "suffix"):
        exclusive, mine, drafted = (values[name] for values in by_proposer)
        assert 0 < exclusive < mine < drafted < num_nodes
    alone, all_accepted, all_drafted = (sum(each.values()) for each in by_proposer)
    assert alone < accepted < all_accepted
    # A node has one proposer or both.
    assert alone + (all_accepted - alone) / 2 == accepted
    assert num_nodes < all_drafted
    ranks = readings.by("rank", "treespec_accepted_by_rank")
    assert sum(ranks.values()) == accepted
    assert ranks["0"] > ranks["1"] > ranks["8+"] == 0

    # vLLM's own, of whole trees and of each request.
    native = [
        readings.one(f"spec_decode_{name}")
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    ]
    by_depth = readings.one("spec_decode_num_accepted_tokens_per_pos").values
    assert sum(by_depth) == native[2].value
    assert by_depth == sorted(by_depth, reverse=True)
    each = [o.outputs[0].spec_decode_metrics.to_dict() for o in outputs]
    assert [metric.value for metric in native] == [
        sum(metrics[name] for metrics in each)
        for name in ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens")
    ]
    num_rows = num_nodes + readings.one("treespec_padding_rows").value
    mine = [lengths.count, num_nodes, accepted]
    engines = [len(seen.sizes), sum(seen.sizes), sum(seen.lengths)]
    if async_scheduling:
        # vLLM drops a step of each request: it was scheduled before the request ended.
        # Of the engine's last step it never asks for the output.
        assert num_nodes < num_rows <= seen.num_rows  # vLLM scheduled K, always
        for theirs, reported, done in zip(native, mine, engines, strict=True):
            assert theirs.value <= reported <= done
        assert engines[0] - native[0].value <= len(outputs)
    else:
        assert [metric.value for metric in native] == mine == engines
        assert num_rows == seen.num_rows
    assert set(readings.by("reason", "treespec_fallbacks").values()) == {0}
    text_logger = LoggingStatLogger(engine.llm.llm_engine.vllm_config)
    assert isinstance(text_logger.spec_decoding_logging, TreeLogLine)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_steps_without_drafts_are_counted_with_their_reason(
    async_scheduling, model_path, prompts, start, seen, monkeypatch
):
    engine = start(
        model_path("llama"),
        tree={"proposers": [{"type": "suffix"}]},
        num_speculative_tokens=K,
        async_scheduling=async_scheduling,
        max_model_len=64,
    )

    def without() -> dict[str, int]:
        reasons = Readings(engine).by("reason", "treespec_steps_without_drafts")
        return {reason: count for reason, count in reasons.items() if count}

    generate(engine, prompts(2))
    unknown = without()
    assert unknown.keys() == {"nothing_offered"}
    readings = Readings(engine)
    trees = readings.one("treespec_tree_size").count
    assert seen.num_decoded - unknown["nothing_offered"] - trees in (
        range(3) if async_scheduling else [0]
    )
    # vLLM counts steps with a tree as well, not those with placeholders.
    assert readings.one("spec_decode_num_drafts").value <= trees

    # Known text up to the longest length: the last steps have no room for drafts.
    for _ in range(2):
        generate(engine, prompts(2), max_tokens=64)
    crowded = without()
    assert crowded.keys() == {"nothing_offered", "not_scheduled"}

    monkeypatch.setattr(Worth, "drafting", property(lambda self: [False]))
    generate(engine, prompts(2))
    rested = without()
    assert rested.pop("resting") >= 2 * 22
    assert rested == crowded
