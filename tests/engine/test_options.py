"""Request options on trees with several branches: same tokens as no speculation."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams

from vllm_treespec.integration import model_state
from vllm_treespec.testing.planted import PlantedProposer

FEW = list(range(10, 16))  # so that a path says the same again and again


def words_that_repeat(_: list[int]) -> list[list[int]]:
    """a a, and a b a."""
    return [[token, token] for token in FEW] + [
        [token, other, token] for token in FEW for other in FEW if token != other
    ]


def words_of_siblings(output: list[int]) -> list[list[int]]:
    """Words that no path of a tree says, but neighbours in its order do: see below."""
    return [
        [output[at + 2], output[at], output[at + 1]] for at in range(len(output) - 2)
    ]


STOPS = list(range(2, 40))
UP_AND_DOWN = {token: 3.0 if token % 3 else -3.0 for token in range(2, 60)}
PENALTIES = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.7,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.3},
    "min_p, top_k": {"min_p": 0.05, "top_k": 6, "temperature": 1.3},
    "logit_bias": {"logit_bias": UP_AND_DOWN},
    "logit_bias, greedy": {"logit_bias": UP_AND_DOWN, "temperature": 0.0},
    "logit_bias, min_p": {"logit_bias": {7: -100.0, 9: 5.0}, "min_p": 0.2},
    "allowed_token_ids": {"allowed_token_ids": list(range(10, 40))},
    "allowed_token_ids, greedy": {
        "allowed_token_ids": list(range(40, 80)),
        "temperature": 0.0,
    },
    "min_tokens": {"min_tokens": 14, "stop_token_ids": STOPS},
    "min_tokens, greedy": {
        "min_tokens": 11,
        "stop_token_ids": STOPS,
        "temperature": 0.0,
    },
    "repetition_penalty": {"repetition_penalty": 1.6},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.2},
    "negative penalties": {"presence_penalty": -1.0, "frequency_penalty": -1.0},
    "penalties": {**PENALTIES, "temperature": 0.8},
    "penalties, greedy": {**PENALTIES, "temperature": 0.0},
    "penalties of few": {**PENALTIES, "allowed_token_ids": FEW},
    "penalties of few, greedy": {
        **PENALTIES,
        "allowed_token_ids": FEW,
        "temperature": 0.0,
    },
    "bad_words": {"bad_words": words_that_repeat, "allowed_token_ids": FEW},
    "bad_words, greedy": {
        "bad_words": words_that_repeat,
        "allowed_token_ids": FEW,
        "temperature": 0.0,
    },
    "bad_words of siblings": {"bad_words": words_of_siblings},
    "n": {"n": 2, "temperature": 0.9, "frequency_penalty": 0.5},
    "repetition_detection": {
        "allowed_token_ids": [10, 11, 12],
        "temperature": 0.0,
        "repetition_detection": RepetitionDetectionParams(
            max_pattern_size=4, min_pattern_size=1, min_count=3
        ),
    },
    "everything": {
        **PENALTIES,
        "allowed_token_ids": FEW,
        "bad_words": words_that_repeat,
        "logit_bias": {10: 2.0, 11: -2.0},
        "min_p": 0.01,
        "min_tokens": 9,
        "stop_token_ids": [12],
        "temperature": 0.9,
        "top_k": 5,
        "top_p": 0.95,
    },
}
# Some of vLLM's interpreted kernels subtract infinities where tokens are ruled out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered in subtract:RuntimeWarning"
)
NO_OPTIONS = {"greedy", "sampled"}
NUM_TOKENS = 18


@dataclass
class Case:
    """One request, and what it says without speculation."""

    name: str
    prompt: list[int]
    params: SamplingParams
    without: list[list[int]]  # without the option
    plain: list[list[int]] = field(default_factory=list)

    @property
    def truths(self) -> list[list[int]]:
        return [self.prompt + output for output in self.plain]


def sampling(seed: int, **options: Any) -> SamplingParams:
    """``bad_words`` are lists of tokens, because the model has no tokenizer."""
    words = options.pop("bad_words", None)
    params = SamplingParams(
        seed=seed, max_tokens=NUM_TOKENS, detokenize=False, **options
    )
    if words:
        params._bad_words_token_ids = words
    return params


def run(engine: Any, cases: list[Case]) -> list[list[list[int]]]:
    return engine.generate([c.prompt for c in cases], [c.params for c in cases])


KNOWN: list[Case] = []


@pytest.fixture
def cases(start, model_path, prompts) -> list[Case]:
    """A request of every option, decoded without speculation once for all tests."""
    if KNOWN:
        return KNOWN
    engine = start(model_path("llama"))
    batch = prompts(len(OPTIONS))
    bases = [
        sampling(
            seed,
            temperature=float(options.get("temperature", 1.0) > 0),
            n=options.get("n", 1),
        )
        for seed, options in enumerate(OPTIONS.values())
    ]
    without = engine.generate(batch, bases)
    for seed, (name, options) in enumerate(OPTIONS.items()):
        if "bad_words" in options:
            words = options["bad_words"](without[seed][0])
            options = {**options, "bad_words": words}
        KNOWN.append(Case(name, batch[seed], sampling(seed, **options), without[seed]))
    for case, plain in zip(KNOWN, run(engine, KNOWN), strict=True):
        case.plain = plain
    return KNOWN


def test_every_option_changes_something(cases):
    changed = {case.name for case in cases if case.plain != case.without}
    assert changed == OPTIONS.keys() - NO_OPTIONS


def collide(self: PlantedProposer, truth: list[int]) -> list[tuple[int, int, float]]:
    """Along the true path, every token's better siblings are the tokens to come."""
    tree: list[tuple[int, int, float]] = []
    parent, score = -1, 0.0
    for depth in range(len(truth) - 2):
        siblings = dict.fromkeys((truth[depth + 1], truth[depth + 2], truth[depth]))
        if len(tree) + len(siblings) > self._max_nodes:
            break
        for rank, token in enumerate(siblings):
            tree.append((parent, token, score - 0.1 * (rank + 1)))
            if token == truth[depth]:
                truth_node, truth_score = len(tree) - 1, tree[-1][2]
        parent, score = truth_node, truth_score
    return tree


def test_every_option_works_on_trees(cases, start, model_path, acceptance, monkeypatch):
    monkeypatch.setattr(PlantedProposer, "_plant", collide)
    engine = start(
        model_path("llama"),
        truths=[truth for case in cases for truth in case.truths],
        num_speculative_tokens=12,
    )
    for case in cases:
        acceptance.off_first_branch = 0
        assert run(engine, [case]) == [case.plain], case.name
        assert acceptance.off_first_branch > 0, f"{case.name}: no tree was needed"
    assert not engine.runner.speculator.fallbacks


LOOK_BACK = {
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "bad_words of siblings",
}


def test_looking_back_along_a_chain_would_be_wrong(
    cases, start, model_path, monkeypatch
):
    """As a chain, every tree of these has said the next tokens already."""
    monkeypatch.setattr(PlantedProposer, "_plant", collide)
    monkeypatch.setattr(model_state, "follow_paths", lambda *_: None)
    mine = [case for case in cases if case.name in LOOK_BACK]
    engine = start(
        model_path("llama"),
        truths=[truth for case in mine for truth in case.truths],
        num_speculative_tokens=12,
    )
    for case, output in zip(mine, run(engine, mine), strict=True):
        assert output != case.plain, case.name


@pytest.mark.parametrize(
    ("kernels", "async_scheduling"),
    [("torch", False), ("torch", True), ("triton", True)],
)
def test_options_do_not_disturb_each_other(
    kernels, async_scheduling, cases, start, model_path, acceptance
):
    mixed = list(cases)
    random.Random(1).shuffle(mixed)
    if kernels == "triton":  # interpreted, so only those whose kernels are ours
        mixed = [case for case in cases if case.name in LOOK_BACK | NO_OPTIONS]
    engine = start(
        model_path("llama"),
        tree={"kernels": kernels},
        truths=[truth for case in cases for truth in case.truths],
        async_scheduling=async_scheduling,
    )
    assert run(engine, mixed) == [case.plain for case in mixed]
    assert acceptance.off_first_branch > 0


def logprobs_of(output: Any) -> list[dict[int, tuple[int, float]]]:
    """Of every prompt and output token, per token: rank and log-prob."""
    rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return [
        {token: (entry.rank, entry.logprob) for token, entry in row.items()}
        for row in rows
    ]


@pytest.mark.parametrize(
    "mode", ["raw_logprobs", "processed_logprobs", "processed_logits"]
)
def test_logprobs_are_those_of_the_accepted_path(
    mode, model_path, prompts, start, acceptance
):
    batch = [{"prompt_token_ids": prompt} for prompt in prompts(5)]
    scored = {"logprobs": 3, "prompt_logprobs": 2}
    params = [
        sampling(0, temperature=0.0, **scored),
        sampling(1, **scored, **PENALTIES),
        sampling(2, **scored, logit_bias=UP_AND_DOWN, bad_words=[[5], [6, 7]]),
        sampling(3, logprob_token_ids=[3, 1, 4, 15], prompt_logprobs=1),
        sampling(4, **scored, top_k=7, min_p=0.01),
    ]

    def generate(engine):
        return engine.llm.generate(batch, params, use_tqdm=False)

    options = {"logprobs_mode": mode}
    plain = generate(start(model_path("llama"), **options))
    truths = [
        list(each.prompt_token_ids) + list(each.outputs[0].token_ids) for each in plain
    ]
    trees = generate(start(model_path("llama"), truths=truths, **options))
    assert acceptance.off_first_branch > 0
    for wanted, got in zip(plain, trees, strict=True):
        assert got.outputs[0].token_ids == wanted.outputs[0].token_ids
        for expected, actual in zip(logprobs_of(wanted), logprobs_of(got), strict=True):
            assert actual.keys() == expected.keys()
            for token, (rank, logprob) in expected.items():
                assert actual[token] == (rank, pytest.approx(logprob, abs=1e-4))
