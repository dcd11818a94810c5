"""Requests of every kind come, share, starve, abort and leave in one engine."""

from __future__ import annotations

import random

import pytest
from vllm import SamplingParams

OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.1, "top_k": 12, "min_tokens": 4},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.8, "presence_penalty": 0.5},
]


def make_requests(count, seed):
    rng = random.Random(seed)
    shared = [rng.randrange(2, 97) for _ in range(64)]
    requests = []
    for number in range(count):
        prompt = [rng.randrange(2, 97) for _ in range(rng.choice((1, 2, 9, 27, 70)))]
        if rng.random() < 0.4:
            prompt = shared + prompt[:8]
        params = SamplingParams(
            seed=number,
            max_tokens=rng.randint(4, 40),
            detokenize=False,
            **rng.choice(OPTIONS),
        )
        requests.append((prompt, params))
    return requests


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize(
    ("architecture", "num_blocks"), [("llama", 7), ("gemma2", 11)], ids=str
)
def test_nobody_notices_the_trees(
    architecture, num_blocks, async_scheduling, model_path, start, acceptance
):
    requests = make_requests(18, seed=3)
    options = {
        "max_num_seqs": 5,
        "max_num_batched_tokens": 72,
        "num_gpu_blocks_override": num_blocks,
        "max_model_len": 128,
        "block_size": 32,
        "enable_prefix_caching": True,
        "async_scheduling": async_scheduling,
    }
    batch, params = map(list, zip(*requests, strict=True))
    plain = start(model_path(architecture), **options).generate(batch, params)
    truths = [p + o[0] for p, o in zip(batch, plain, strict=True)]

    engine = start(model_path(architecture), truths=truths, **options)
    core = engine.llm.llm_engine
    rng = random.Random(7)
    waiting = list(range(len(requests)))
    aborted = {4, 11}
    finished: dict[int, list[int]] = {}
    steps = 0
    while waiting or core.has_unfinished_requests():
        steps += 1
        for _ in range(rng.randint(0, 2)):
            if waiting:
                number = waiting.pop(0)
                prompt, request_params = requests[number]
                core.add_request(
                    str(number), {"prompt_token_ids": prompt}, request_params
                )
        if steps % 9 == 0:
            core.abort_request([str(number) for number in aborted])
        for output in core.step():
            if output.finished:
                token_ids = list(output.outputs[0].token_ids)
                finished[int(output.request_id)] = token_ids
    for number, output in finished.items():
        if number in aborted:
            assert output == plain[number][0][: len(output)]
        else:
            assert output == plain[number][0], requests[number]
    assert finished.keys() | aborted == set(range(len(requests)))
    assert engine.metric("vllm:num_preemptions") > 0
    assert acceptance.off_first_branch > 0
