"""What requests and the load make of trees, and that no token changes with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_treespec.integration.rejection_sampler import TreeRejectionSampler
from vllm_treespec.integration.speculator import TreeSpeculator
from vllm_treespec.integration.worth import Worth
from vllm_treespec.testing.planted import PlantedProposer

K = 8
LIMITS = [
    {},
    {"treespec_max_nodes": 0},
    {"treespec_max_nodes": 3},
    {"treespec_proposers": "suffix"},
    {"treespec_proposers": ["ngram", "draft_model"], "treespec_max_nodes": 5},
    {"treespec_proposers": []},
]


@dataclass
class Seen:
    """Of every step: requests in it, rows for drafts, and proposers of the nodes."""

    steps: list[dict[str, tuple[int, set[str]]]] = field(default_factory=list)

    def verified(self, speculator: Any, batch: Any) -> None:
        ends, step = batch.cu_num_logits.tolist(), {}
        for row, slot in enumerate(batch.idx_mapping_np.tolist()):
            rows = ends[row + 1] - ends[row] - 1
            count = min(rows + 1, int(speculator.trees.num_nodes[slot]))
            bits = speculator.trees.proposers[slot, 1:count].tolist()
            names = {
                name
                for index, name in enumerate(speculator._names)
                if any(bit >> index & 1 for bit in bits)
            }
            step[batch.req_ids[row]] = (rows, names)
        self.steps.append(step)

    def of(self, request: int) -> tuple[int, set[str]]:
        """The most rows that a request ever had, and all who proposed for it."""
        mine = [
            each
            for step in self.steps
            for name, each in step.items()
            if name.split("-")[0] == str(request)
        ]
        assert mine, "it was never verified"
        return max(rows for rows, _ in mine), set().union(*(who for _, who in mine))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    log, verify = Seen(), TreeRejectionSampler.__call__

    def verify_and_log(self: Any, logits: Any, batch: Any, *rest: Any) -> Any:
        result = verify(self, logits, batch, *rest)
        log.verified(self._speculator, batch)
        return result

    monkeypatch.setattr(TreeRejectionSampler, "__call__", verify_and_log)
    return log


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_request_is_never_given_more_than_it_asked_for(
    async_scheduling, model_path, draft_path, prompts, start, plain_greedy, seen
):
    batch = [prompt * 2 for prompt in prompts(len(LIMITS), longest=20)]
    plain = plain_greedy(model_path("llama"), batch, 24)
    model = {"type": "draft_model", "model": draft_path("llama"), "depth": 3}
    engine = start(
        model_path("llama"),
        tree={"proposers": [model, {"type": "suffix"}, {"type": "ngram"}]},
        num_speculative_tokens=K,
        async_scheduling=async_scheduling,
    )
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=24, detokenize=False, extra_args=limits
        )
        for limits in LIMITS
    ]
    assert [choices[0] for choices in engine.generate(batch, params)] == plain
    everyone = {"draft_model", "suffix", "ngram"}
    expected = [
        (K, everyone),
        (0, set()),
        (3, everyone),
        (K, {"suffix"}),
        (5, {"ngram", "draft_model"}),
        (0, set()),
    ]
    for request, (rows, who) in enumerate(expected):
        most, proposers = seen.of(request)
        assert most <= rows
        assert proposers <= who
    # With async scheduling all rows are placeholders, so the limit is always reached.
    full = [seen.of(request)[0] for request in (0, 2, 4)]
    assert full == [K, 3, 5]
    metrics = {
        each.labels["reason"]: each.value
        for each in engine.llm.get_metrics()
        if each.name == "vllm:treespec_steps_without_drafts"
    }
    assert metrics["not_wanted"] >= 2 * 22


def test_defaults_hold_for_requests_that_ask_for_nothing(
    model_path, prompts, start, plain_greedy, seen
):
    batch = [prompt * 2 for prompt in prompts(2)]
    plain = plain_greedy(model_path("llama"), batch, 16)
    engine = start(
        model_path("llama"),
        tree={
            "proposers": [{"type": "ngram"}],
            "request_defaults": {"max_nodes": 0},
        },
    )
    asked = SamplingParams(
        temperature=0.0,
        max_tokens=16,
        detokenize=False,
        extra_args={"treespec_max_nodes": 2},
    )
    plainly = SamplingParams(temperature=0.0, max_tokens=16, detokenize=False)
    assert [o[0] for o in engine.generate(batch, [plainly, asked])] == plain
    assert seen.of(0) == (0, set())
    assert seen.of(1) == (2, {"ngram"})


def test_options_that_cannot_be_had_are_refused_before_anything_runs(
    model_path, prompts, start
):
    engine = start(model_path("llama"), tree={"proposers": [{"type": "ngram"}]})
    wrong = SamplingParams(extra_args={"treespec_max_nodes": 99}, detokenize=False)
    with pytest.raises(VLLMValidationError, match=r"=99: must be in \[0, 8\]"):
        engine.generate(prompts(1), wrong)
    # Somebody else's options are none of our business.
    other = SamplingParams(extra_args={"kv_stuff": 1}, max_tokens=2, detokenize=False)
    assert len(engine.generate(prompts(1), other)[0][0]) == 2


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_the_more_requests_the_smaller_their_trees(
    async_scheduling,
    model_path,
    prompts,
    start,
    plain_greedy,
    seen,
    acceptance,
    monkeypatch,
):
    widths, propose = set(), PlantedProposer.propose

    def asked(proposer: Any, step: Any) -> Any:
        widths.add(step.max_candidates)
        return propose(proposer, step)

    monkeypatch.setattr(PlantedProposer, "propose", asked)
    batch = prompts(8)
    plain = plain_greedy(model_path("llama"), batch, 40)
    truths = [prompt + output for prompt, output in zip(batch, plain, strict=True)]
    engine = start(
        model_path("llama"),
        truths=truths,
        tree={"max_rows": 12},
        num_speculative_tokens=K,
        async_scheduling=async_scheduling,
    )
    # Of different lengths, so that the batch shrinks from 8 requests to one.
    lengths = [*range(3, 24, 3), 40]
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, detokenize=False)
        for length in lengths
    ]
    outputs = [choices[0] for choices in engine.generate(batch, params)]
    assert outputs == [
        output[:length] for output, length in zip(plain, lengths, strict=True)
    ]
    assert acceptance.off_first_branch > 0
    budgets = {1: K, 2: 3, 3: 3, 4: 1, 5: 1, 6: 1, 7: 0, 8: 0}
    rows = dict.fromkeys(budgets, 0)
    for step in seen.steps:
        most = max(count for count, _ in step.values())
        rows[len(step)] = max(rows[len(step)], most)
    assert all(rows[size] <= budget for size, budget in budgets.items()), rows
    assert rows[1] == K
    assert widths == {K, 3, 1}  # no more is drafted than there is room for
    reasons = {
        each.labels["reason"]: each.value
        for each in engine.llm.get_metrics()
        if each.name == "vllm:treespec_steps_without_drafts"
    }
    assert reasons["busy"] >= 8


def test_while_nobody_drafts_nothing_is_scheduled_for_drafts(
    model_path, prompts, start, plain_greedy, seen, monkeypatch
):
    """With async scheduling, placeholders are scheduled before drafts are known."""
    calls = 0

    def drafting(worth: Worth) -> list[bool]:
        return [not 10 <= calls < 30]

    def propose(speculator: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(speculator, *args, **options)

    original = TreeSpeculator.propose
    monkeypatch.setattr(TreeSpeculator, "propose", propose)
    monkeypatch.setattr(Worth, "drafting", property(drafting))
    batch = prompts(3)
    expected = plain_greedy(model_path("llama"), batch, 100)
    tree = {"proposers": [{"type": "recycle"}]}
    engine = start(
        model_path("llama"), tree=tree, num_speculative_tokens=K, async_scheduling=True
    )
    calls = 0
    assert engine.greedy(batch, 100) == expected
    assert calls > 40
    # Of all steps only those with drafts are seen: two more until the scheduler knows.
    assert calls - 20 <= len(seen.steps) + 4 and len(seen.steps) < calls - 15
    assert all(rows == K for step in seen.steps for rows, _ in step.values())
