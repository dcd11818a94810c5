"""The target drafts for itself with layers skipped: greedy output must not notice."""

from __future__ import annotations

import pytest

SETS = {
    "prefix": {"attention": [2, 3], "mlp": [2, 3]},
    "not a prefix": {"attention": [1, 2], "mlp": [1, 2]},
    "attention only": {"attention": [0, 1, 2]},
    "mlp only": {"mlp": [1, 2, 3]},
    "first": {"attention": [0], "mlp": [0, 1]},
}


@pytest.mark.parametrize("skipped", SETS)
def test_every_skip_set(skipped, deep_model_path, prompts, start, acceptance):
    model = deep_model_path("llama")
    batch = prompts(4)
    plain = start(model).greedy(batch)
    engine = start(
        model,
        tree={
            "proposers": [
                {
                    "type": "layer_skip",
                    "skip": SETS[skipped],
                    "depth": 4,
                    "width": 3,
                    "top_k": 3,
                }
            ],
            "adaptive": False,
        },
        num_speculative_tokens=8,
    )
    assert engine.greedy(batch) == plain
    print("ACC", sum(acceptance.lengths)/len(acceptance.lengths)); assert sum(acceptance.lengths) > 0
