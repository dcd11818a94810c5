"""What the engine's metrics say, against what its rejection sampler saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_treespec.integration.rejection_sampler import TreeRejectionSampler

K = 8  # nodes per tree


@dataclass
class Seen:
    """Of every verified tree: its nodes, and how many of them were accepted."""

    sizes: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    log = Seen()
    original = TreeRejectionSampler.__call__

    def verify(self: Any, logits: Any, input_batch: Any, *rest: Any) -> Any:
        result = original(self, logits, input_batch, *rest)
        ends, slots = input_batch.cu_num_logits.tolist(), input_batch.idx_mapping
        for row, slot in enumerate(slots[: input_batch.num_reqs].tolist()):
            scheduled = ends[row + 1] - ends[row] - 1
            size = min(int(self._speculator.trees.num_nodes[slot]) - 1, scheduled)
            if size > 0:
                log.sizes.append(size)
                log.lengths.append(int(self._speculator.paths.lengths[row]))
        return result

    monkeypatch.setattr(TreeRejectionSampler, "__call__", verify)
    return log


@dataclass
class Readings:
    """``LLM.get_metrics()`` by name."""

    metrics: list[Any]

    def named(self, name: str) -> list[Any]:
        found = [each for each in self.metrics if each.name == f"vllm:{name}"]
        assert found, f"no series {name}"
        for each in found:
            assert each.labels["engine"] == "0" and each.labels["model_name"]
        return found

    def one(self, name: str) -> Any:
        (metric,) = self.named(name)
        return metric

    def by(self, label: str, name: str) -> dict[str, int]:
        return {each.labels[label]: each.value for each in self.named(name)}


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_series_agree_with_the_engine_and_each_other(
    async_scheduling, model_path, draft_path, prompts, start, seen
):
    draft = {"type": "draft_model", "model": draft_path("llama"), "depth": 3}
    engine = start(
        model_path("llama"),
        tree={"proposers": [{**draft, "width": 2}, {"type": "suffix"}]},
        num_speculative_tokens=K,
        async_scheduling=async_scheduling,
        per_request_spec_decode_metrics="summary",
    )
    for _ in range(2):  # the second time, everything was seen before
        outputs = engine.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts(4)],
            SamplingParams(max_tokens=24, temperature=0.0, detokenize=False),
            use_tqdm=False,
        )
    readings = Readings(engine.llm.get_metrics())
    for each in readings.metrics:
        if "spec" in each.name: print(each)
    print(outputs[0].metrics)
    print(seen)
    assert 0
