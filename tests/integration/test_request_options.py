"""Options that vLLM refuses with speculation, and which of them get a chain."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_treespec.integration import fallback
from vllm_treespec.integration.plugin import register

TARGET = str(Path(__file__).parents[2] / "models/python-stdlib/target")
TREE = {"method": "treespec", "tree": {"proposers": [{"type": "ngram"}]}}
NGRAM_GPU = {"method": "ngram_gpu", "num_speculative_tokens": 3}
OPTIONS = [{"min_p": 0.1}, {"logit_bias": {3: -1.0}}]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    register()


def verify(speculative_config, **options):
    """What vLLM does with a request, in a process that got its config by pickle."""
    args = EngineArgs(
        model=TARGET,
        speculative_config=speculative_config,
        dtype="float32",
        enforce_eager=True,
    )
    config = pickle.loads(pickle.dumps(args.create_engine_config()))
    params = SamplingParams(**options)
    params.verify(
        config.model_config,
        config.speculative_config,
        config.structured_outputs_config,
        None,
    )
    return params


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_trees_take_what_vllm_refuses_with_speculation(options):
    params = verify(TREE, **options)
    assert {name: getattr(params, name) for name in options} == options


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_other_methods_still_refuse(options):
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        verify(NGRAM_GPU, **options)


def test_options_that_no_request_can_have_are_still_refused():
    with pytest.raises(ValueError, match="trace_decode_token_ids is not supported"):
        verify(TREE, min_p=0.1, trace_decode_token_ids=[1, 2])
    with pytest.raises(VLLMValidationError, match="out-of-vocab"):
        verify(TREE, logit_bias={10**6: 1.0})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"repetition_penalty": 1.2, "min_p": 0.1, "bad_words": ["no"]}, None),
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, None),
        ({"thinking_token_budget": 9}, "thinking_budget"),
    ],
)
def test_who_gets_a_chain(options, reason):
    params = SamplingParams(**options)
    assert fallback.chain_reason(params, has_custom_processors=False) == reason
    custom = fallback.chain_reason(params, has_custom_processors=True)
    assert custom == (reason or "logits_processors")


def test_fallbacks_are_counted_and_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(fallback.logger, "info", lambda *words: said.append(words[1]))
    fallbacks = Counter()
    for reason in ("one", "one", "another", "one"):
        fallback.count_fallback(fallbacks, reason)
    assert fallbacks == {"one": 3, "another": 1}
    assert said == ["one", "another"]
