"""A small model says the same in a larger shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_treespec.testing.inflate import Inflated, Shape

MODELS = Path(__file__).parents[2] / "models/python-stdlib"
TARGET = Shape.of(json.loads((MODELS / "target/config.json").read_text()))
# Every dimension grows, by factors of which few are powers of two.
LARGER = Shape(
    hidden_size=333,
    num_hidden_layers=8,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=192,
    intermediate_size=700,
    vocab_size=2300,
    tie_word_embeddings=False,
)
PROMPTS = torch.randint(2, 2048, (3, 40), generator=torch.Generator().manual_seed(0))


def model_of(inflated: Inflated) -> LlamaForCausalLM:
    config = LlamaConfig(**inflated.config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    model.to_empty(device="cpu")
    weights = dict(inflated.weights(torch.float32, torch.device("cpu")))
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    # What is computed rather than loaded did not survive the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def small_model(role: str = "target") -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODELS / role, dtype=torch.float32)


def greedy(model: LlamaForCausalLM, count: int = 24) -> list[list[int]]:
    token_ids = PROMPTS
    for _ in range(count):
        newest = model(token_ids, logits_to_keep=1).logits[:, -1].argmax(-1)
        token_ids = torch.cat([token_ids, newest[:, None]], 1)
    return token_ids[:, PROMPTS.shape[1] :].tolist()


@pytest.mark.parametrize(
    "shape",
    [
        LARGER,
        replace(LARGER, tie_word_embeddings=True),
        replace(TARGET, num_hidden_layers=7),
        replace(TARGET, hidden_size=512),
        replace(TARGET, head_dim=128),
        replace(TARGET, num_attention_heads=8),
        replace(TARGET, num_attention_heads=16, num_key_value_heads=4),
        replace(TARGET, hidden_size=260, vocab_size=2049),
    ],
    ids=["all", "all, tied", "layers", "hidden", "head", "queries", "KV", "tokens"],
)
@torch.inference_mode()
def test_a_larger_shape_has_the_same_logits(shape):
    logits = model_of(Inflated(MODELS / "target", shape))(PROMPTS).logits
    expected = small_model()(PROMPTS).logits
    known = logits[..., : TARGET.vocab_size]
    torch.testing.assert_close(known, expected, rtol=1e-4, atol=1e-4)
    assert (logits[..., TARGET.vocab_size :] < known.amin() - 100).all()


@torch.inference_mode()
def test_a_larger_shape_says_the_same():
    assert greedy(model_of(Inflated(MODELS / "target", LARGER))) == greedy(
        small_model()
    )


def test_the_small_shape_itself_gives_its_own_weights():
    weights = dict(
        Inflated(MODELS / "target", TARGET).weights(torch.float32, torch.device("cpu"))
    )
    for name, weight in small_model().state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, "hidden_size=128: must be at least 256"),
        ({"head_dim": 96}, "head_dim=96: must be a multiple of 64"),
        ({"num_key_value_heads": 4}, "too few for each KV head"),
        ({"vocab_size": 4096}, "unless hidden_size does"),
    ],
)
def test_a_shape_that_cannot_be_exact_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Inflated(MODELS / "target", replace(TARGET, **change))
