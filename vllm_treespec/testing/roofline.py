"""The least time that tree attention can take on a GPU, from its data sheet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks of a data sheet; nothing reaches them."""

    name: str
    arch: int  # compute capability
    num_sms: int
    bytes_per_second: float  # of device memory
    flops_per_second: float  # of dense half precision with a float32 sum


H200 = Device("H200", 90, 132, 4.8e12, 989e12)
A100 = Device("A100 80GB", 80, 108, 2.039e12, 312e12)


class Heads(NamedTuple):
    """One layer's attention on one GPU."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


LLAMA_8B = Heads("Llama 8B", 32, 8, 128)
LLAMA_70B_TP8 = Heads("Llama 70B, one of 8", 8, 1, 128)


class Work(NamedTuple):
    """What a batch needs at least, in one layer."""

    num_bytes: int  # every key and value once, queries in and outputs out
    num_flops: int

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.num_flops / self.num_bytes

    def least_us(self, device: Device) -> float:
        return 1e6 * max(
            self.num_bytes / device.bytes_per_second,
            self.num_flops / device.flops_per_second,
        )


def attention_work(
    heads: Heads, num_reqs: int, num_nodes: int, context: int, cache_bytes: int = 2
) -> Work:
    """Trees of ``num_nodes`` behind ``context`` keys, half-precision queries."""
    seq_len = context + num_nodes
    kv_bytes = 2 * seq_len * heads.num_kv_heads * heads.head_size * cache_bytes
    query_bytes = num_nodes * heads.num_heads * heads.head_size * 2
    # Masked scores are computed too.
    flops = 4 * num_nodes * heads.num_heads * seq_len * heads.head_size
    return Work(num_reqs * (kv_bytes + 2 * query_bytes), num_reqs * flops)
