"""Draft weights that sleep discards come back, and vLLM knows which they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def wake(worker: Any) -> None:
    worker.wake_up(["weights"])


def reload(worker: Any) -> None:
    worker.reload_weights()


def lose(worker: Any, draft: torch.nn.Module, model: torch.nn.Module) -> None:
    """What level-2 sleep leaves behind; a CPU's memory is not taken away."""
    worker.sleep(2)
    restored = {id(each) for each in model.buffers()}  # of rotary embeddings, shared
    with torch.no_grad():
        for tensor in [*draft.parameters(), *draft.buffers()]:
            if id(tensor) not in restored:
                tensor.zero_()


@pytest.mark.parametrize("way_back", [wake, reload])
def test_a_draft_is_as_good_after_sleep_as_before(
    way_back: Callable[[Any], None], model_path, draft_path, prompts, start
):
    drafts = {"type": "draft_model", "model": draft_path("llama"), "depth": 4}
    engine = start(model_path("llama"), tree={"proposers": [drafts]})
    core = engine.llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker

    def answer() -> tuple[list[list[int]], float]:
        name = "vllm:spec_decode_num_accepted_tokens"
        before = engine.metric(name)
        said = engine.greedy(prompts(2), 24, ignore_eos=True)
        return said, engine.metric(name) - before

    said, accepted = answer()
    assert accepted > 5
    known = worker._get_sleep_parameters(engine.runner.model)
    assert any(name.startswith("draft.") for name in known)
    lose(worker, worker.get_draft_model(), engine.runner.model)
    assert answer() != (said, accepted), "the draft is gone"
    way_back(worker)
    assert answer() == (said, accepted)
