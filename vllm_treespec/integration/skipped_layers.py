"""The target's own modules once more, without some of their sub-layers.

A decoder layer adds the outputs of its attention and of its feed-forward part to what
it was given, so leaving a part out is to put zeros in its place. Modules on the way
from the model to the part are copied without their weights; everything else is shared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.attention import Attention

from vllm_treespec.config import ConfigError, SkipSet
from vllm_treespec.integration.stopwatch import Stopwatch

# Layers whose parts were read to be such sums.
KNOWN_LAYERS = {
    "GemmaDecoderLayer",
    "Gemma2DecoderLayer",
    "Gemma3DecoderLayer",
    "GraniteDecoderLayer",
    "GraniteMoeDecoderLayer",
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "MixtralDecoderLayer",
    "OlmoeDecoderLayer",
    "PhiMoEDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen2MoeDecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3MoeDecoderLayer",
}
ATTENTION = "self_attn"
FEED_FORWARD = ("mlp", "block_sparse_moe")


class SkippedPart(torch.nn.Module):
    """In place of an attention or feed-forward part: adds nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = (*args, *kwargs.values())
        hidden = next(each for each in given if _is_hidden(each))
        return torch.zeros_like(hidden)


class TimedPart(torch.nn.Module):
    """A part, and how long it takes."""

    def __init__(self, part: torch.nn.Module, clock: Stopwatch, lap: int) -> None:
        super().__init__()
        self.part, self._clock, self._lap = part, clock, lap

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.measure(self._lap):
            return self.part(*args, **kwargs)


class SkippedLayer(torch.nn.Module):
    """In place of a whole layer: hands on what it was given."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, *residual: Any, **_: Any
    ) -> Any:
        # Granite's layers keep no residual beside the hidden states.
        return (hidden, *residual) if residual else hidden


def default_skip_set(num_layers: int) -> SkipSet:
    """Every other layer, but not the first nor the last two."""
    skipped = tuple(range(1, num_layers - 2, 2))
    return SkipSet(attention=skipped, mlp=skipped)


def layers_of(target: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The decoder layers, and where in the model they are.

    Raises:
        ConfigError: if a layer is not known to be a sum of its parts.
    """
    lists = (
        (path, module)
        for path, module in target.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and any(isinstance(each, Attention) for each in module.modules())
    )
    path, layers = next(lists, ("", torch.nn.ModuleList()))
    if not path:
        raise ConfigError(f"layer_skip: {type(target).__name__} has no list of layers")
    for layer in layers:
        if type(layer).__name__ not in KNOWN_LAYERS:
            raise ConfigError(
                f"layer_skip: layers of type {type(layer).__name__} are not known to be "
                f"sums of their parts; known: {sorted(KNOWN_LAYERS)}"
            )
    return path, layers


def fingerprint(target: torch.nn.Module) -> str:
    """Tells models apart, whatever they are quantized to or divided into: a digest of
    the first layer's and the last layer's norms."""
    _, layers = layers_of(target)
    digest = hashlib.sha256(str(len(layers)).encode())
    for layer in (layers[0], layers[-1]):
        weight = layer.get_parameter("input_layernorm.weight").detach()
        digest.update(weight.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def outside(skip: SkipSet, num_layers: int) -> list[str]:
    """What a set asks of a model with so many layers that it does not have."""
    problems = [
        f"{name}: layer {layer} is skipped, the model has layers 0 to {num_layers - 1}"
        for name in ("attention", "mlp")
        for layer in getattr(skip, name)
        if layer >= num_layers
    ]
    if len({*skip.attention} & {*skip.mlp}) == num_layers:
        problems.append("no layer is left")
    if skip.num_layers not in (None, num_layers):
        problems.append(f"num_layers={skip.num_layers}: the model has {num_layers}")
    return problems


def check_skip_set(skip: SkipSet, target: torch.nn.Module) -> None:
    """
    Raises:
        ConfigError: if the set is not one of this model.
    """
    problems = outside(skip, len(layers_of(target)[1]))
    if skip.fingerprint not in (None, own := fingerprint(target)):
        problems.append(
            f"fingerprint={skip.fingerprint!r}: tuned for another model "
            f"({skip.model!r}), this one's is {own!r}; run 'vllm-treespec tune "
            "layer-skip' for it"
        )
    if problems:
        raise ConfigError("layer_skip: skip." + "; skip.".join(problems))


def skipping(
    target: torch.nn.Module, skip: SkipSet, clock: Stopwatch | None = None
) -> tuple[torch.nn.Module, set[str]]:
    """The model without these parts, and the names of the attention layers it has.

    Args:
        clock: measures the parts that are kept, lap ``n`` the attention of layer ``n``
            and lap ``num_layers + n`` its feed-forward part.
    """
    path, layers = layers_of(target)
    kept = torch.nn.ModuleList(
        _without(layer, index in skip.attention, index in skip.mlp)
        for index, layer in enumerate(layers)
    )
    names = {each.layer_name for each in kept.modules() if isinstance(each, Attention)}
    if clock is not None:
        kept = torch.nn.ModuleList(
            _timed(layer, clock, index, len(layers)) for index, layer in enumerate(kept)
        )
    return _replaced(target, path.split("."), kept), names


def _without(layer: torch.nn.Module, attention: bool, mlp: bool) -> torch.nn.Module:
    if attention and mlp:
        return SkippedLayer()
    for part in _parts(layer, attention, mlp):
        layer = _replaced(layer, [part], SkippedPart())
    return layer


def _timed(
    layer: torch.nn.Module, clock: Stopwatch, index: int, num_layers: int
) -> torch.nn.Module:
    for attention in (True, False):
        lap = index if attention else num_layers + index
        for part in _parts(layer, attention, not attention):
            timed = TimedPart(getattr(layer, part), clock, lap)
            layer = _replaced(layer, [part], timed)
    return layer


def _parts(layer: torch.nn.Module, attention: bool, mlp: bool) -> list[str]:
    """Names of the layer's parts of these kinds."""
    wanted = ((ATTENTION,) if attention else ()) + (FEED_FORWARD if mlp else ())
    return [name for name in wanted if hasattr(layer, name)]


def _replaced(
    module: torch.nn.Module, path: Sequence[str], part: torch.nn.Module
) -> torch.nn.Module:
    """A copy that shares all but what leads to the replaced part."""
    name, *rest = path
    if rest:
        part = _replaced(getattr(module, name), rest, part)
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = {
        **module.__dict__,
        "_modules": {**module._modules, name: part},
        # What vLLM has compiled is the original.
        "do_not_compile": True,
    }
    return copied


def with_fused_kernels(module: torch.nn.Module) -> torch.nn.Module:
    """The module with vLLM's own kernels in place of what it leaves to a compiler; shares
    all weights, and itself if nothing is different. Inside ``set_current_vllm_config``."""
    parts = {
        name: part if part is None else with_fused_kernels(part)
        for name, part in module._modules.items()
    }
    is_left = (
        isinstance(module, CustomOp)
        and not (module._enforce_enable or module.enabled())
        and not hasattr(module, "layer_name")  # known to vLLM by that name, once
    )
    if not is_left and all(
        parts[name] is each for name, each in module._modules.items()
    ):
        return module
    copied: Any = module.__class__.__new__(module.__class__)
    copied.__dict__ = {**module.__dict__, "_modules": parts}
    if is_left:
        copied._enforce_enable = True
        copied._forward_method = copied.dispatch_forward(compile_native=False)
    result: torch.nn.Module = copied
    return result


def _is_hidden(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
