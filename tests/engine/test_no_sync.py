"""With proposers on the device, no step waits for it; the host may run ahead."""

import pytest

from vllm_treespec.integration import speculator
from vllm_treespec.testing.no_sync import NoSync

RECYCLE = {"type": "recycle", "k": 6, "depth": 5}


@pytest.mark.parametrize("name", ["recycle", "draft_model", "layer_skip", "all"])
def test_nothing_waits_for_the_device(
    name, deep_model_path, draft_path, prompts, start, plain_greedy, monkeypatch
):
    model, batch = deep_model_path("llama"), prompts(4)
    expected = plain_greedy(model, batch)
    known = {
        "recycle": RECYCLE,
        "draft_model": {
            "type": "draft_model",
            "model": draft_path("llama"),
            "depth": 3,
        },
        "layer_skip": {
            "type": "layer_skip",
            "skip": {"attention": [1, 2]},
        },
    }
    proposers = list(known.values()) if name == "all" else [known[name]]
    watch, choose = NoSync(), speculator.choose_kernels
    monkeypatch.setattr(
        speculator, "choose_kernels", lambda *args: watch.wrap(choose(*args))
    )
    methods = "propose", "verified", "add_request", "remove_request"
    steps = dict.fromkeys(methods, 0)
    for method in steps:
        original = getattr(speculator.TreeSpeculator, method)

        def watched(*args, original=original, method=method, **options):
            steps[method] += 1
            with watch:
                return original(*args, **options)

        monkeypatch.setattr(speculator.TreeSpeculator, method, watched)
    engine = start(
        model,
        tree={"proposers": proposers},
        num_speculative_tokens=10,
        async_scheduling=True,
    )
    assert engine.greedy(batch) == expected
    assert min(steps.values()) >= len(batch)
    assert watch.num_calls > 20 * steps["propose"]
    assert not engine.runner.speculator.drafts.faulty
