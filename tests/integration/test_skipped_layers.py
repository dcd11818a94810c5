"""Leaving parts of layers out, on toy layers whose parts add what is easy to read."""

import pytest
import torch

from vllm_treespec.config import ConfigError, SkipSet
from vllm_treespec.integration import skipped_layers
from vllm_treespec.integration.skipped_layers import layers_of, skipping
from vllm_treespec.integration.stopwatch import Stopwatch


class Attention(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        self.layer_name = f"layers.{index}.attn"
        self.weight = torch.nn.Parameter(torch.tensor(10.0**index))

    def forward(self, positions, hidden_states):
        return torch.zeros_like(hidden_states) + self.weight.detach()


class Mlp(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2 * 10.0**index))

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states) + self.weight.detach()


class LlamaDecoderLayer(torch.nn.Module):
    """Keeps a residual beside the hidden states, as most do."""

    def __init__(self, index):
        super().__init__()
        self.self_attn, self.mlp = Attention(index), Mlp(index)

    def forward(self, positions, hidden, residual):
        residual = hidden if residual is None else residual + hidden
        attended = self.self_attn(positions=positions, hidden_states=hidden)
        residual = residual + attended
        return self.mlp(attended), residual


class GraniteDecoderLayer(LlamaDecoderLayer):
    def forward(self, positions, hidden):
        hidden = hidden + self.self_attn(positions, hidden)
        return hidden + self.mlp(hidden)


class UnknownLayer(LlamaDecoderLayer):
    pass


class Inner(torch.nn.Module):
    do_not_compile = False

    def __init__(self, kind):
        super().__init__()
        self.layers = torch.nn.ModuleList(kind(index) for index in range(3))

    def forward(self, hidden):
        residual, positions = None, torch.zeros(1, dtype=torch.int64)
        for layer in self.layers:
            if isinstance(self.layers[0], GraniteDecoderLayer):
                hidden = layer(positions, hidden)
            else:
                hidden, residual = layer(positions, hidden, residual)
        return hidden if residual is None else hidden + residual


class Target(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.model = Inner(kind)

    def forward(self, hidden):
        return self.model(hidden)


@pytest.fixture(autouse=True)
def toy_attention(monkeypatch):
    monkeypatch.setattr(skipped_layers, "Attention", Attention)


@pytest.mark.parametrize("kind", [LlamaDecoderLayer, GraniteDecoderLayer])
@pytest.mark.parametrize(
    ("skip", "added"),
    [
        (SkipSet(), 333),
        (SkipSet(attention=(1,)), 323),
        (SkipSet(mlp=(2,)), 133),
        (SkipSet(attention=(1, 2), mlp=(1,)), 203),
        (SkipSet(attention=(2,), mlp=(0, 2)), 31),
    ],
)
def test_what_is_skipped_adds_nothing_and_the_rest_what_it_did(kind, skip, added):
    target = Target(kind)
    draft, names = skipping(target, skip)
    assert draft(torch.tensor([0.5])).tolist() == [added + 0.5]
    assert target(torch.tensor([0.5])).tolist() == [333.5]
    kept = {0, 1, 2} - {*skip.attention}
    assert names == {f"layers.{index}.attn" for index in kept}


def test_everything_is_shared_but_the_way_to_what_is_skipped():
    target = Target(LlamaDecoderLayer)
    draft, _ = skipping(target, SkipSet(attention=(1,), mlp=(2,)))
    assert {*draft.parameters()} < {*target.parameters()}
    assert draft.model.layers[0] is target.model.layers[0]
    assert draft.model.layers[1].mlp is target.model.layers[1].mlp
    assert draft.model.do_not_compile and not target.model.do_not_compile


def test_parts_are_timed_by_layer_and_kind():
    clock = Stopwatch(7, torch.device("cpu"))
    draft, _ = skipping(Target(LlamaDecoderLayer), SkipSet(), clock)
    assert draft(torch.tensor([0.0])).tolist() == [333]
    *parts, whole = clock.seconds()
    assert all(each > 0 for each in parts)
    assert whole == 0  # is for whoever runs the model


def test_unknown_layers_are_refused_by_name():
    with pytest.raises(ConfigError, match="layers of type UnknownLayer are not known"):
        layers_of(Target(UnknownLayer))
    with pytest.raises(ConfigError, match="Linear has no list of layers"):
        layers_of(torch.nn.Linear(2, 2))
