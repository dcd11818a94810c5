"""Structured output of models that reason first: the grammar waits for their end."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.sampling_params import StructuredOutputsParams

from vllm_treespec.integration import grammar, speculator
from vllm_treespec.testing.planted import PlantedProposer

TARGET = str(Path(__file__).parents[2] / "models/python-stdlib/target")
PROMPTS = ["def push(self, item):\n", "import os\n\ndef main():\n"]
ENDS = ("ation", "Ġ2")  # what the target says of its own accord, some tokens on


@ReasoningParserManager.register_module("until-a-word")
class UntilAWord(ReasoningParser):
    """Takes everything up to one of these words for reasoning."""

    def __init__(self, tokenizer, *args, **kwargs):
        super().__init__(tokenizer, *args, **kwargs)
        self.ends = {self.vocab[word] for word in ENDS}

    def is_reasoning_end(self, input_ids):
        return not self.ends.isdisjoint(input_ids)

    def is_reasoning_end_streaming(self, input_ids, delta_ids):
        return not self.ends.isdisjoint(delta_ids)

    def extract_content_ids(self, input_ids):
        return input_ids

    def extract_reasoning(self, model_output, request):
        return None, model_output

    def extract_reasoning_streaming(self, *args):
        return None


@pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")
@pytest.mark.parametrize(
    ("backend", "async_scheduling"), [("xgrammar", True), ("guidance", False)]
)
def test_trees_reach_over_the_end_of_reasoning(
    backend, async_scheduling, start, acceptance, monkeypatch
):
    structured = StructuredOutputsParams(regex=r"(ab|cd|return){3,9};")
    greedy = SamplingParams(
        temperature=0.0, max_tokens=30, structured_outputs=structured
    )
    options = {
        "skip_tokenizer_init": False,
        "structured_outputs_config": {
            "backend": backend,
            "reasoning_parser": "until-a-word",
        },
    }
    plain = start(TARGET, **options)
    expected = plain.llm.generate(PROMPTS, greedy, use_tqdm=False)
    tokenizer = plain.llm.get_tokenizer()
    ends = set(tokenizer.convert_tokens_to_ids(list(ENDS)))
    truths = []
    for output in expected:
        said = list(output.outputs[0].token_ids)
        assert ends.intersection(said[2:20]), "reasoning never ended, or at once"
        truths.append(list(output.prompt_token_ids) + said)

    found, original = [], grammar.ends_of_reasoning

    def ends_of_reasoning(*args):
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(grammar, "ends_of_reasoning", ends_of_reasoning)
    monkeypatch.setattr(
        speculator,
        "make_proposers",
        lambda *_, **__: [PlantedProposer(truths, vocab_size=2048, max_nodes=12)],
    )
    engine = start(
        TARGET,
        tree={"proposers": [{"type": "suffix"}]},
        num_speculative_tokens=12,
        async_scheduling=async_scheduling,
        **options,
    )
    trees = engine.llm.generate(PROMPTS, greedy, use_tqdm=False)
    assert [each.outputs[0].text for each in trees] == [
        each.outputs[0].text for each in expected
    ]
    assert any(found), "no tree had an end of reasoning in it"
    assert acceptance.off_first_branch > 0
    assert not engine.runner.speculator.fallbacks

    sampled = SamplingParams(
        temperature=0.7, n=4, max_tokens=25, structured_outputs=structured
    )
    [output] = engine.llm.generate(PROMPTS[1:], sampled, use_tqdm=False)
    assert all(obeys(tokenizer, ends, each) for each in output.outputs)


def obeys(tokenizer, ends, answer):
    """What follows the reasoning, if it ended, is what the grammar allows."""
    said = list(answer.token_ids)
    places = [place for place, token in enumerate(said) if token in ends]
    if not places:
        return True
    text = tokenizer.decode(said[places[0] + 1 :], skip_special_tokens=True)
    for word in ("ab", "cd", "return"):
        text = text.replace(word, "")
    is_whole = answer.finish_reason == "stop"
    return text == ";" if is_whole else text in "return" or text in ("a", "c")
