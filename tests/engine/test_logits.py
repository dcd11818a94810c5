"""What verification makes of the target's logits, of which there is a row per node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample import sampler

from vllm_treespec.integration.rejection_sampler import TreeRejectionSampler


class Copies(TorchDispatchMode):
    """Names the operations that make something of the logits' shape in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = torch.Size()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_float = isinstance(result, torch.Tensor) and result.dtype == torch.float32
        if is_float and result.shape == self.shape and not func.is_view:
            self.names.append(str(func))
        return result


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plain_requests_are_sampled_from_the_logits_as_they_are(
    temperature, model_path, prompts, start, monkeypatch
):
    """Of a large vocabulary, a float32 copy of all rows is most of what a step writes."""
    copies, original = Copies(), TreeRejectionSampler.__call__
    num_verified = []

    def verify(self: Any, logits: torch.Tensor, *rest: Any) -> Any:
        assert logits.dtype == torch.bfloat16
        copies.shape = logits.shape
        num_verified.append(len(logits))
        with copies:
            return original(self, logits, *rest)

    def sample(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():  # an interpreted kernel is made of torch
            return gumbel_sample(*args, **options)

    gumbel_sample = sampler.gumbel_sample
    monkeypatch.setattr(sampler, "gumbel_sample", sample)
    monkeypatch.setattr(TreeRejectionSampler, "__call__", verify)
    tree = {"proposers": [{"type": "recycle"}]}
    engine = start(model_path("llama"), tree=tree, dtype="bfloat16")
    plain = SamplingParams(temperature=temperature, max_tokens=12, detokenize=False)
    engine.generate(prompts(3), plain)
    assert max(num_verified) > 6
    assert not copies.names
    engine.generate(prompts(1), SamplingParams(max_tokens=4, top_k=5, detokenize=False))
    assert copies.names  # the watch sees what other options cost
