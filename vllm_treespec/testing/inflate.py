"""A small Llama inside a large one: its text at the large one's cost.

Weights are padded with zeros, further layers add nothing, and what the small model says
stays what it says. In exact arithmetic the logits are the same; what each dimension
needs for that:

- ``hidden_size``: any larger one. RMSNorm's mean is over more numbers, so its weight is
  scaled by ``sqrt(small / large)`` and epsilon by ``small / large``.
- ``head_dim``: a multiple. Dimension ``j`` of a half moves to ``multiple * j``, where
  RoPE has the same frequency; queries are scaled against attention's larger divisor.
- ``num_heads``, ``num_kv_heads``: no fewer, nor fewer query heads for each of the latter.
- ``intermediate_size``, ``num_layers``: no fewer. ``o_proj`` and ``down_proj`` of
  further layers are zero.
- ``vocab_size``: no smaller, and then ``hidden_size`` must grow, too: one more hidden
  dimension is a constant that every embedding sets and no layer reads, and it alone
  drives the logits of further tokens far down. It is too small to change a norm.

Not covered: biases, norms of queries and keys, scaled RoPE, experts, quantized weights,
and float16, whose range the constant leaves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

Names = tuple[str, ...]
CONSTANT = 2.0**-20
FAR_DOWN = -(2.0**20)
ATTENTION: Names = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP: Names = ("gate_proj", "up_proj", "down_proj")
NORMS: Names = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a Llama costs."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool

    @staticmethod
    def of(config: dict[str, Any]) -> Shape:
        return Shape(**{name: config[name] for name in Shape.__slots__})


LLAMA_1B = Shape(
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=8192,
    vocab_size=128256,
    tie_word_embeddings=True,
)
LLAMA_8B = Shape(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    tie_word_embeddings=False,
)
# Layers of the 70B model, a quarter of them: 36 GiB in bfloat16.
LLAMA_70B_QUARTER = Shape(
    hidden_size=8192,
    num_hidden_layers=20,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=28672,
    vocab_size=128256,
    tie_word_embeddings=False,
)


class Inflated:
    """The checkpoint in ``folder`` in the shape of a larger one."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self._folder = folder
        self._config = json.loads((folder / "config.json").read_text())
        self.small, self.large = Shape.of(self._config), shape
        if problems := list(self._problems()):
            raise ValueError(f"{folder} does not fit: " + "; ".join(problems))
        self._shrunk = self.small.hidden_size / shape.hidden_size
        self._has_new_tokens = shape.vocab_size > self.small.vocab_size

    def _problems(self) -> Iterator[str]:
        small, large = self.small, self.large
        for name, size in asdict(small).items():
            if name != "tie_word_embeddings" and getattr(large, name) < size:
                yield f"{name}={getattr(large, name)}: must be at least {size}"
        if large.head_dim % small.head_dim:
            yield f"head_dim={large.head_dim}: must be a multiple of {small.head_dim}"
        if _num_queries(large) < _num_queries(small):
            yield f"num_attention_heads={large.num_attention_heads}: too few for each KV head"
        has_room = large.hidden_size > small.hidden_size
        if large.vocab_size > small.vocab_size and not has_room:
            yield "vocab_size: cannot grow unless hidden_size does"
        if large.tie_word_embeddings and not small.tie_word_embeddings:
            yield "tie_word_embeddings: the small model's are not tied"
        rope = self._config["rope_parameters"]["rope_type"]
        if rope != "default":
            yield f"rope_type={rope!r}: only 'default' is covered"

    @property
    def config(self) -> dict[str, Any]:
        """Of a ``config.json`` for the large model."""
        eps = self._config["rms_norm_eps"] * self._shrunk
        return {**self._config, **asdict(self.large), "rms_norm_eps": eps}

    def weights(
        self, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The large model's, one at a time: no more than that is in memory."""
        with safe_open(self._folder / "model.safetensors", framework="pt") as file:

            def read(name: str) -> torch.Tensor:
                weight: torch.Tensor = file.get_tensor(f"{name}.weight")
                return weight.float()

            embedding = read("model.embed_tokens")
            head = embedding if self.small.tie_word_embeddings else read("lm_head")
            yield (
                "model.embed_tokens.weight",
                self._embedding(embedding).to(device, dtype),
            )
            if not self.large.tie_word_embeddings:
                yield "lm_head.weight", self._head(head).to(device, dtype)
            norm = self._norm(read("model.norm"))
            if self._has_new_tokens:
                norm[self.small.hidden_size] = sqrt(self._shrunk) / CONSTANT
            yield "model.norm.weight", norm.to(device, dtype)
            for layer in range(self.large.num_hidden_layers):
                is_new = layer >= self.small.num_hidden_layers
                for part in NORMS:
                    name = f"model.layers.{layer}.{part}"
                    norm = torch.zeros(0) if is_new else read(name)
                    yield f"{name}.weight", self._norm(norm).to(device, dtype)
                for group, parts in (("self_attn", ATTENTION), ("mlp", MLP)):
                    for part in parts:
                        name = f"model.layers.{layer}.{group}.{part}"
                        weight = self._empty(part, dtype, device)
                        if not is_new:
                            self._fill(weight, part, read(name).to(device))
                        yield f"{name}.weight", weight

    def _embedding(self, small: torch.Tensor) -> torch.Tensor:
        """``[vocab, hidden]``; as a tied head, it pushes new tokens down as well."""
        large = self._head(small)
        if self._has_new_tokens:
            large[: len(small), self.small.hidden_size] = CONSTANT
        return large

    def _head(self, small: torch.Tensor) -> torch.Tensor:
        num_tokens, hidden = small.shape
        large = torch.zeros(self.large.vocab_size, self.large.hidden_size)
        large[:num_tokens, :hidden] = small
        large[num_tokens:, hidden : hidden + 1] = FAR_DOWN
        return large

    def _norm(self, small: torch.Tensor) -> torch.Tensor:
        large = torch.zeros(self.large.hidden_size)
        large[: len(small)] = small * sqrt(self._shrunk)
        return large

    def _empty(
        self, part: str, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        large = self.large
        width = {
            "q_proj": large.num_attention_heads * large.head_dim,
            "o_proj": large.num_attention_heads * large.head_dim,
            "k_proj": large.num_key_value_heads * large.head_dim,
            "v_proj": large.num_key_value_heads * large.head_dim,
        }.get(part, large.intermediate_size)
        sizes = (width, large.hidden_size)
        if part in ("o_proj", "down_proj"):
            sizes = sizes[::-1]
        return torch.zeros(sizes, dtype=dtype, device=device)

    def _fill(self, large: torch.Tensor, part: str, small: torch.Tensor) -> None:
        """Put a small weight where it belongs."""
        if part in ("o_proj", "down_proj"):
            large, small = large.T, small.T
        if part in MLP:
            rows = torch.arange(len(small))
        elif part in ("k_proj", "v_proj"):
            rows = self._rows(torch.arange(self.small.num_key_value_heads))
        else:
            heads = torch.arange(self.small.num_attention_heads)
            group = heads // _num_queries(self.small)
            member = heads % _num_queries(self.small)
            rows = self._rows(group * _num_queries(self.large) + member)
        if part == "q_proj":
            # Attention divides by the root of head_dim.
            small = small * sqrt(self.large.head_dim / self.small.head_dim)
        large[rows.to(large.device), : self.small.hidden_size] = small.to(large.dtype)

    def _rows(self, heads: torch.Tensor) -> torch.Tensor:
        """``[num_heads * small head_dim]``, rows of the large heads."""
        half = self.small.head_dim // 2
        spread = torch.arange(half) * (self.large.head_dim // self.small.head_dim)
        dims = torch.cat([spread, spread + self.large.head_dim // 2])
        return (heads[:, None] * self.large.head_dim + dims).flatten()


def _num_queries(shape: Shape) -> int:
    """Query heads that share a key-value head."""
    return shape.num_attention_heads // shape.num_key_value_heads
