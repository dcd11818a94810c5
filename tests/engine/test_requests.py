"""Request options and proposers through the real engine: same tokens as without."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import transformers
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

MODELS = Path(__file__).parents[2] / "models/python-stdlib"
TARGET, DRAFT = str(MODELS / "target"), str(MODELS / "draft")
CODE = [
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
    "import os\nimport sys\n\n\ndef main(argv):\n",
    "def test_add(self):\n    self.assertEqual(1 + 2, 3)\n\ndef test_sub(self):\n",
]
NUMBERS = {"type": "array", "items": {"type": "integer"}}
SUFFIX = {"type": "suffix"}
NGRAM = {"type": "ngram"}


def tree(*proposers):
    return {"proposers": list(proposers)}


@pytest.mark.parametrize(
    "proposers", [(SUFFIX,), (NGRAM,), (SUFFIX, NGRAM)], ids=["suffix", "ngram", "both"]
)
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_real_proposers_keep_the_tokens_and_save_steps(
    proposers, async_scheduling, start, acceptance
):
    options = {"skip_tokenizer_init": False, "async_scheduling": async_scheduling}
    params = SamplingParams(temperature=0.0, max_tokens=40)
    texts = start(TARGET, **options).llm.generate(CODE, params, use_tqdm=False)
    engine = start(TARGET, tree=tree(*proposers), **options)
    outputs = engine.llm.generate(CODE, params, use_tqdm=False)
    assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in texts]
    accepted = engine.metric("vllm:spec_decode_num_accepted_tokens")
    assert accepted > 0
    # Async scheduling also verifies a step of a request that has just ended.
    beyond_the_end = sum(acceptance.lengths) - accepted
    assert beyond_the_end >= 0 if async_scheduling else beyond_the_end == 0


def test_suffix_remembers_other_requests_and_can_forget(start, acceptance):
    """The second time around, a finished answer is drafted from the global text."""
    params = SamplingParams(temperature=0.0, max_tokens=48)
    engine = start(TARGET, tree=tree(SUFFIX), skip_tokenizer_init=False)

    def steps() -> int:
        acceptance.lengths.clear()
        for prompt in CODE:
            engine.llm.generate([prompt], params, use_tqdm=False)
        return len(acceptance.lengths)

    first, second = steps(), steps()
    assert second < first
    engine.llm.collective_rpc("treespec_clear")
    assert steps() == first


def test_stop_strings_inside_an_accepted_path(start, acceptance):
    free = SamplingParams(temperature=0.0, max_tokens=48)
    plain = start(TARGET, skip_tokenizer_init=False)
    whole = plain.llm.generate(CODE, free, use_tqdm=False)
    stop = [output.outputs[0].text[20:24] for output in whole]
    params = SamplingParams(temperature=0.0, max_tokens=48, stop=stop)
    expected = plain.llm.generate(CODE, params, use_tqdm=False)
    engine = start(TARGET, tree=tree(SUFFIX), skip_tokenizer_init=False)
    # What it learns from the uncut answers makes paths run past the stop.
    engine.llm.generate(CODE, free, use_tqdm=False)
    acceptance.lengths.clear()
    outputs = engine.llm.generate(CODE, params, use_tqdm=False)
    for got, wanted, uncut in zip(outputs, expected, whole, strict=True):
        assert got.outputs[0].text == wanted.outputs[0].text
        assert got.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert got.outputs[0].stop_reason == wanted.outputs[0].stop_reason
        assert len(wanted.outputs[0].text) < len(uncut.outputs[0].text)
    assert max(acceptance.lengths) > 1


def test_eos_inside_an_accepted_path(start, acceptance, tmp_path):
    """The end-of-text token is made one that greedy output holds."""
    free = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    options = {"skip_tokenizer_init": False}
    whole = start(TARGET, **options).llm.generate(CODE, free, use_tqdm=False)
    token_ids = [list(output.outputs[0].token_ids) for output in whole]
    eos = max(
        set(token_ids[0]), key=lambda token: sum(token in ids for ids in token_ids)
    )

    model = tmp_path / "model"
    shutil.copytree(TARGET, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(TARGET)
    settings["eos_token"] = tokenizer.convert_ids_to_tokens(eos)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))

    params = SamplingParams(temperature=0.0, max_tokens=40)
    plain = start(str(model), **options).llm.generate(CODE, params, use_tqdm=False)
    cut = [list(output.outputs[0].token_ids) for output in plain]
    assert any(ids[-1] == eos and len(ids) < 40 for ids in cut)
    engine = start(str(model), tree=tree(SUFFIX), **options)
    # What it learns from the uncut answers makes paths run past the end of text.
    engine.llm.generate(CODE, free, use_tqdm=False)
    acceptance.lengths.clear()
    trees = engine.llm.generate(CODE, params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in trees] == cut
    assert sum(acceptance.lengths) + len(acceptance.lengths) > sum(map(len, cut)) - 3


# vLLM asks xgrammar in a way that it warns about, and drops a request that fails.
@pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")
@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("choice", ["json", "regex"])
def test_structured_output_obeys(choice, async_scheduling, start, acceptance):
    from vllm.sampling_params import StructuredOutputsParams

    structured = StructuredOutputsParams(
        **(
            {"json": {**NUMBERS, "minItems": 5, "maxItems": 6}}
            if choice == "json"
            else {"regex": r"(ab|cd){3,9};"}
        )
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=30, structured_outputs=structured
    )
    prompts = ["x = [1, 2, 3, 1, 2, 3, ", "abcdababcdab"]
    options = {"skip_tokenizer_init": False, "async_scheduling": async_scheduling}
    plain = start(TARGET, **options).llm.generate(prompts, params, use_tqdm=False)
    draft = {"type": "draft_model", "model": DRAFT, "depth": 4, "width": 4}
    proposers = tree(SUFFIX, NGRAM, draft)
    engine = start(TARGET, tree=proposers, num_speculative_tokens=12, **options)
    trees = engine.llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].text for o in trees] == [o.outputs[0].text for o in plain]
    assert sum(acceptance.lengths) > 4
    assert not engine.runner.speculator.fallbacks
    sampled = SamplingParams(
        temperature=1.0, n=4, max_tokens=40, structured_outputs=structured
    )
    for output in engine.llm.generate(prompts, sampled, use_tqdm=False):
        for each in output.outputs:
            assert_obeys(choice, each.text, each.finish_reason == "stop")


def assert_obeys(choice, text, is_whole):
    """A text that was cut short is the beginning of one that obeys."""
    if choice == "json" and is_whole:
        assert all(isinstance(each, int) for each in json.loads(text))
    elif choice == "json":
        assert re.fullmatch(r"[\s\[\]\d,.eE+-]*", text)
    else:
        assert re.fullmatch(r"(ab|cd){3,9};" if is_whole else r"(ab|cd)*[ac]?", text)


class ForbidTheTokenBefore(LogitsProcessor):
    """A user's processor that reads a request's rows as a chain of drafts."""

    def __init__(self, vllm_config, req_states):
        self.req_states = req_states

    def add_request(self, req_idx, sampling_params):
        return True

    def apply(self, logits, ctx):
        states = self.req_states
        for row, slot in enumerate(ctx.expanded_idx_mapping.tolist()):
            before = (
                ctx.input_ids[row - 1]
                if ctx.expanded_local_pos[row] > 0
                else states.all_token_ids.gpu[slot, states.total_len.gpu[slot] - 2]
            )
            logits[row, before] = float("-inf")
        return logits


def test_custom_logits_processors_get_a_chain(model_path, prompts, start, acceptance):
    batch = prompts(3)
    options = {"logits_processors": [ForbidTheTokenBefore]}
    plain = start(model_path("llama"), **options).greedy(batch, 20)
    assert plain != start(model_path("llama")).greedy(batch, 20)
    truths = [p + o for p, o in zip(batch, plain, strict=True)]
    engine = start(model_path("llama"), truths=truths, **options)
    assert engine.greedy(batch, 20) == plain
    assert acceptance.off_first_branch == 0
    assert max(acceptance.lengths) > 1
    assert engine.runner.speculator.fallbacks == {"logits_processors": 3}
    assert engine.metric("vllm:treespec_fallbacks") == 3


def test_bad_words_of_a_text_get_trees(start, acceptance):
    options = {"skip_tokenizer_init": False}
    free = SamplingParams(temperature=0.0, max_tokens=32)
    plain = start(TARGET, **options)
    outputs = plain.llm.generate(CODE, free, use_tqdm=False)
    words = [output.outputs[0].text.split()[1] for output in outputs]
    params = SamplingParams(temperature=0.0, max_tokens=32, bad_words=words)
    expected = plain.llm.generate(CODE, params, use_tqdm=False)
    engine = start(TARGET, tree=tree(SUFFIX, NGRAM), **options)
    trees = engine.llm.generate(CODE, params, use_tqdm=False)
    assert [o.outputs[0].text for o in trees] == [o.outputs[0].text for o in expected]
    assert acceptance.off_first_branch > 0
    assert not engine.runner.speculator.fallbacks


@pytest.mark.parametrize("fault", ["raises", "lies", "stalls"])
def test_a_proposer_that_fails_costs_speed_not_the_request(
    fault, model_path, prompts, start, monkeypatch, caplog
):
    batch = prompts(3)
    plain = start(model_path("llama")).greedy(batch, 16)
    engine = start(model_path("llama"), truths=[], tree={"draft_timeout_ms": 500})
    proposer = engine.proposers[0]
    original = proposer.propose
    calls, over = 0, threading.Event()

    def propose(step):
        nonlocal calls
        calls += 1
        candidates = original(step)
        if calls == 3:
            if fault == "raises":
                raise RuntimeError("out of ideas")
            if fault == "stalls":
                over.wait(60)
            candidates.token_ids[:, 0] = 10**6
        return candidates

    monkeypatch.setattr(proposer, "propose", propose)
    assert engine.greedy(batch, 16) == plain
    over.set()
    assert calls == 3  # then it was dismissed
    assert engine.metric("vllm:treespec_proposer_faults") == 1


def test_requests_without_drafts_are_not_padded(model_path, prompts, start):
    """The synchronous scheduler verifies what was drafted, not a full budget."""
    batch = prompts(2)
    engine = start(model_path("llama"), tree=tree({"type": "ngram", "min_n": 5}))
    engine.greedy(batch, 16)
    assert engine.metric("vllm:spec_decode_num_draft_tokens") == 0


def test_trees_and_no_trees_take_turns_in_one_process(model_path, prompts, start):
    batch = prompts(2)
    first = start(model_path("llama")).greedy(batch, 8)
    assert start(model_path("llama"), tree=tree(NGRAM)).greedy(batch, 8) == first
    assert start(model_path("llama")).greedy(batch, 8) == first
