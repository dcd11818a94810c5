"""``recycle`` in the engine: alone and beside others, the tokens stay the target's."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

from vllm_treespec.core.propose.recycle import Recycler
from vllm_treespec.integration.recycle import Recycle
from vllm_treespec.kernels.recycling import NONE
from vllm_treespec.testing.no_sync import NoSync

RECYCLE = {"type": "recycle", "k": 6, "depth": 5}


def tree_of(*proposers, **options):
    return {"proposers": list(proposers), "adaptive": False, **options}


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("others", [[], ["suffix"], ["draft_model"]])
def test_greedy_tokens_are_those_of_no_speculation(
    others,
    async_scheduling,
    model_path,
    draft_path,
    prompts,
    start,
    plain_greedy,
    acceptance,
):
    batch = prompts(4)
    options = {"async_scheduling": async_scheduling}
    plain = plain_greedy(model_path("llama"), batch, 32)
    known = {
        "suffix": {"type": "suffix"},
        "draft_model": {
            "type": "draft_model",
            "model": draft_path("llama"),
            "depth": 3,
        },
    }
    engine = start(
        model_path("llama"),
        tree=tree_of(RECYCLE, *(known[name] for name in others)),
        num_speculative_tokens=10,
        **options,
    )
    speculator = engine.runner.speculator
    # Who shares a tree offers more than it holds.
    assert speculator.drafts.recycle.recycler.num_candidates == (20 if others else 10)
    assert speculator.builder.candidates.token_ids.shape[2] == (20 if others else 10)
    assert engine.greedy(batch, 32) == plain
    # What was said once is in the table, which makes the second time easier.
    before = len(acceptance.lengths)
    assert engine.greedy(batch, 32) == plain
    if not others:
        num_steps = len(acceptance.lengths) - before
        assert sum(acceptance.lengths[before:]) > num_steps / 2
    assert speculator.drafts.recycle is not None  # was not dismissed
    assert speculator.hosted is None or not speculator.hosted.faulty


def test_sampled_tokens_are_right_and_nothing_waits_for_the_device(
    model_path, prompts, start, acceptance, monkeypatch
):
    """Chunked prompts, greedy and seeded requests, some of them padded with drafts
    that they do not have; then the table is emptied."""
    batch = [*prompts(4), *prompts(2, shortest=80, longest=90, seed=3)]
    params = [
        SamplingParams(
            temperature=temperature,
            seed=7,
            max_tokens=20,
            detokenize=False,
            ignore_eos=True,
            repetition_penalty=penalty,
        )
        for temperature, penalty in ((0, 1), (1, 1), (0.5, 1.2)) * 2
    ]
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
    plain = start(model_path("llama"), **options).generate(batch, params)
    watch = NoSync()
    for name in ("add_prompt", "learn", "catch_up", "propose"):
        original = getattr(Recycle, name)

        def watched(*arguments, original=original, **named):
            with watch:
                return original(*arguments, **named)

        monkeypatch.setattr(Recycle, name, watched)
    engine = start(
        model_path("llama"),
        tree=tree_of(RECYCLE),
        num_speculative_tokens=10,
        **options,
    )
    recycle = engine.runner.speculator.drafts.recycle
    kernels = watch.wrap(recycle._kernels)
    recycle._kernels = recycle.recycler._kernels = kernels
    recycle.recycler.rates._kernels = kernels
    assert engine.generate(batch, params) == plain
    assert engine.generate(batch, params) == plain
    assert sum(acceptance.lengths) > 0
    assert watch.num_calls > 100
    assert engine.runner.speculator.drafts.recycle is recycle
    assert engine.runner.speculator.sampled is None  # nobody draws
    table = recycle.recycler.table
    assert bool((table.token_ids != NONE).any())
    engine.llm.collective_rpc("treespec_clear")
    assert bool((table.token_ids == NONE).all())


@pytest.mark.parametrize("broken", ["grow", "learn_nodes", "learn_prompt"])
def test_a_proposer_that_fails_is_dismissed(
    broken, model_path, prompts, start, plain_greedy, monkeypatch
):
    batch = prompts(3)
    plain = plain_greedy(model_path("llama"), batch, 12)
    engine = start(model_path("llama"), tree=tree_of(RECYCLE, {"type": "ngram"}))

    def fail(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Recycler, broken, fail)
    assert engine.greedy(batch, 12) == plain
    assert engine.runner.speculator.drafts.recycle is None
    assert engine.greedy(batch, 12) == plain


def test_the_table_learns_what_the_target_said_after_every_node(
    model_path, prompts, start, monkeypatch
):
    """The contexts and picks that the engine hands over are those of the text."""
    seen = []
    original = Recycler.learn_nodes

    def learn_nodes(self, contexts, logits, picks):
        seen.append((contexts, logits.argmax(1), picks))
        original(self, contexts, logits, picks)

    monkeypatch.setattr(Recycler, "learn_nodes", learn_nodes)
    batch = prompts(3)
    engine = start(model_path("llama"), tree=tree_of(RECYCLE), num_speculative_tokens=6)
    (texts,) = [
        [prompt + output for prompt, output in zip(batch, outputs, strict=True)]
        for outputs in [engine.greedy(batch, 24)]
    ]
    triples = {
        tuple(text[place : place + 3]) for text in texts for place in range(len(text))
    }
    num_accepted = num_guessed = 0
    for contexts, favourites, picks in seen:
        for before, token_id, favourite, pick in zip(
            *(each.tolist() for each in (*contexts, favourites, picks)), strict=True
        ):
            if token_id == NONE:
                continue
            if pick == NONE:
                num_guessed += 1
                continue
            assert pick == favourite  # greedy
            # Behind the end of a text nothing is known, and beyond it is emitted.
            num_accepted += (before, token_id, pick) in triples
    num_emitted = sum(len(text) for text in texts) - sum(map(len, batch))
    assert num_accepted >= num_emitted - 2 * len(batch)
    assert num_guessed > 0
    assert torch.cat([each[2] for each in seen]).numel() > num_accepted
