"""Sampled output has the target's distribution, measured through the engine.

Tiny vocabularies, so that the joint distribution of the first tokens can be computed
with transformers and compared by chi-square with what the engine says.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import transformers
from vllm import SamplingParams

VOCAB_SIZE = 7
PROMPT = [3, 1, 4, 2, 5]
NUM_TOKENS = 3
BATCH = 128
FALSE_ALARM_RATE = 1e-6
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target, and a draft that is the target with noise on its weights."""
    torch.manual_seed(1)
    target = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    paths = [str(tmp_path_factory.mktemp(name)) for name in ("target", "draft")]
    target.save_pretrained(paths[0])
    draft = transformers.LlamaForCausalLM.from_pretrained(paths[0])
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.25 * weight.std() * torch.randn_like(weight)
    draft.save_pretrained(paths[1])
    return (*paths, target)


def processed(logits, path, options):
    """The target's probabilities after vLLM's documented request options."""
    logits = logits.double().clone()
    for token, bias in options.get("logit_bias", {}).items():
        logits[token] += bias
    counts = Counter(path)
    repetition = options.get("repetition_penalty", 1.0)
    for token in {*PROMPT, *path}:
        logits[token] = (
            logits[token] / repetition
            if logits[token] > 0
            else logits[token] * repetition
        )
    for token, count in counts.items():
        logits[token] -= options.get("frequency_penalty", 0.0) * count
        logits[token] -= options.get("presence_penalty", 0.0)
    logits /= options["temperature"]
    if "min_p" in options:
        probabilities = logits.softmax(-1)
        logits[probabilities < options["min_p"] * probabilities.max()] = -math.inf
    if "top_k" in options:
        logits[logits < logits.topk(options["top_k"]).values[-1]] = -math.inf
    if "top_p" in options:
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(0) - ordered >= options["top_p"]
        logits[order[outside]] = -math.inf
    return logits.softmax(-1)


def joint_distribution(target, options):
    """Path -> probability of the first tokens."""
    paths = {(): 1.0}
    for _ in range(NUM_TOKENS):
        batch = torch.tensor([[*PROMPT, *path] for path in paths])
        with torch.no_grad():
            logits = target(batch).logits[:, -1]
        paths = {
            (*path, token): probability * float(share)
            for (path, probability), row in zip(paths.items(), logits, strict=True)
            for token, share in enumerate(processed(row, path, options))
            if share > 0
        }
    return paths


def chi_square(counts, distribution):
    """Statistic and degrees of freedom; outcomes that are too rare are put together."""
    total = sum(counts.values())
    statistic, cells, rare, rare_expected = 0.0, 0, 0, 0.0
    for outcome, probability in distribution.items():
        expected = total * probability
        if expected < 5:
            rare, rare_expected = rare + counts[outcome], rare_expected + expected
            continue
        statistic += (counts[outcome] - expected) ** 2 / expected
        cells += 1
    if rare_expected > 0:
        statistic += (rare - rare_expected) ** 2 / rare_expected
        cells += 1
    return statistic, cells - 1


def critical_value(degrees):
    """Chi-square quantile by Wilson and Hilferty; errs by under 1% here."""
    spread = 2 / (9 * degrees)
    deviate = torch.special.ndtri(torch.tensor(1 - FALSE_ALARM_RATE).double()).item()
    return degrees * (1 - spread + deviate * math.sqrt(spread)) ** 3


CONFIGURATIONS = {
    "without_replacement T=1": ("without_replacement", {"temperature": 1.0}),
    "without_replacement T=.5": ("without_replacement", {"temperature": 0.5}),
    "without_replacement top-p": (
        "without_replacement",
        {"temperature": 1.0, "top_p": 0.7},
    ),
    "without_replacement top-k": (
        "without_replacement",
        {"temperature": 1.0, "top_k": 3},
    ),
    "without_replacement min-p": (
        "without_replacement",
        {"temperature": 1.0, "min_p": 0.2},
    ),
    "without_replacement penalties": (
        "without_replacement",
        {
            "temperature": 1.0,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
        },
    ),
    "without_replacement logit_bias": (
        "without_replacement",
        {"temperature": 0.8, "logit_bias": {2: 1.5, 4: -1.0}},
    ),
    "traversal T=1": ("traversal", {"temperature": 1.0}),
    "traversal T=.5 top-p": ("traversal", {"temperature": 0.5, "top_p": 0.8}),
    "mixed T=.5": ("traversal", {"temperature": 0.5}),
    "mixed T=1": ("traversal", {"temperature": 1.0}),
    "target_only T=1": ("target_only", {"temperature": 1.0}),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if place == 0 else [pytest.mark.statistics])
        for place, name in enumerate(CONFIGURATIONS)
    ],
)
@pytest.mark.parametrize("num_samples", [3072])
@pytest.mark.timeout(1800)  # where nothing is drawn, every pick is interpreted
def test_sampled_output_has_the_targets_distribution(
    name, num_samples, models, start, acceptance, record_property
):
    rule, options = CONFIGURATIONS[name]
    target_path, draft_path, target = models
    proposer = {"type": "draft_model", "model": draft_path, "depth": 2, "width": 2}
    engine = start(
        target_path,
        tree={
            "proposers": [{**proposer, "top_k": 3}],
            "verify": rule,
            "draw": "mixed" if name.startswith("mixed") else "without_replacement",
            "adaptive": False,
        },
        num_speculative_tokens=3,
        max_model_len=32,
        max_num_seqs=BATCH,
        max_num_batched_tokens=2048,
        seed=1,
    )
    params = SamplingParams(n=BATCH, max_tokens=NUM_TOKENS, detokenize=False, **options)
    # One batch after the other: while all draw, the target's own picks, which are slow
    # to interpret, are left out.
    counts = Counter(
        tuple(choice)
        for _ in range(num_samples // BATCH)
        for choice in engine.generate([PROMPT], params)[0]
    )
    distribution = joint_distribution(target, options)
    assert not set(counts) - set(distribution)
    statistic, degrees = chi_square(counts, distribution)
    print(
        f"{name}: chi-square {statistic:.1f}, {degrees} degrees of freedom, "
        f"critical {critical_value(degrees):.1f}, "
        f"mean accepted {sum(acceptance.lengths) / len(acceptance.lengths):.2f}"
    )
    assert statistic < critical_value(degrees)
