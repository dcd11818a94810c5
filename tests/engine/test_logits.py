"""What verification makes of the target's logits, of which there is a row per node."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample import sampler

from vllm_treespec.integration import rejection_sampler
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


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


class LiveRows(TorchDispatchMode):
    """How many rows of logits are alive at once, in units of float32."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.most = 0.0
        self._vocab_size = vocab_size
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (
            self._vocab_size,
        ):
            self.see(result)
        return result

    def see(self, tensor: torch.Tensor) -> None:
        self._made.append(weakref.ref(tensor))
        alive = [each for made in self._made if (each := made()) is not None]
        storages = {each.data_ptr(): each.nbytes() for each in map(storage_of, alive)}
        self.most = max(self.most, sum(storages.values()) / 4 / self._vocab_size)


CHUNK = 9  # rows of a tree


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
@pytest.mark.parametrize("draws", [False, True])
def test_float32_copies_of_the_logits_live_for_some_requests_at_a_time(
    mode, draws, model_path, draft_path, prompts, start, monkeypatch
):
    """When vLLM warms up, all rows in float32 may be more memory than is left."""
    original, peaks = TreeRejectionSampler.__call__, []

    def verify(self: Any, logits: torch.Tensor, *rest: Any) -> Any:
        live = LiveRows(logits.shape[1])
        live.see(logits)
        with live:
            result = original(self, logits, *rest)
        peaks.append((logits.shape[0], live.most))
        return result

    monkeypatch.setattr(TreeRejectionSampler, "__call__", verify)
    proposer = {"type": "draft_model", "model": draft_path("llama"), "depth": 4}
    engine = start(
        model_path("llama"),
        tree={
            "proposers": [proposer if draws else {"type": "suffix"}],
            "kernels": "triton",
        },
        logprobs_mode=mode,
    )
    wish = SamplingParams(
        temperature=0.9,
        top_k=20,
        logprobs=3,
        max_tokens=12,
        detokenize=False,
        seed=None if draws else 1,
    )
    batch = prompts(8)
    whole = engine.generate(batch, wish)
    peaks.clear()
    monkeypatch.setattr(rejection_sampler, "get_max_chunk_logits", lambda _: CHUNK)
    assert draws or engine.generate(batch, wish) == whole
    engine.generate(batch, wish)
    assert max(rows for rows, _ in peaks) > 4 * CHUNK
    # The rows of an accepted path, and what a sort makes of a chunk.
    assert max(most - rows for rows, most in peaks) <= 5 * CHUNK
