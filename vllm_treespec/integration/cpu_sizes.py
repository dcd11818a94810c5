"""How many nodes pay on a CPU: every row of a forward pass costs there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from vllm_treespec.config import ConfigError, TreeSpecConfig


class Sizes(NamedTuple):
    """Defaults that take the place of a GPU's."""

    num_nodes: int
    max_rows: int
    min_probability: float  # of a node, from which its row pays


# With AMX, 32 rows of half precision take 1.4 times as long as one, for they wait for the
# weights. Without, 8 rows take 1.7 times as long, 16 take 2.3 times and 32 3.6 times.
# A row pays if it brings more tokens than a step brings in the time that it takes.
WITH_AMX = Sizes(num_nodes=15, max_rows=64, min_probability=0.02)
WITHOUT_AMX = Sizes(num_nodes=7, max_rows=16, min_probability=0.1)


def sizes_for(dtype: str | torch.dtype, *, has_amx: bool) -> Sizes:
    """By what vLLM's ``dtype`` says: only half precision uses AMX."""
    is_half = dtype not in ("float32", "float", torch.float32)
    return WITH_AMX if has_amx and is_half else WITHOUT_AMX


def has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def parse_for_cpu(raw: Mapping[str, Any], sizes: Sizes) -> TreeSpecConfig:
    """As ``TreeSpecConfig.parse``, with these sizes wherever the user gave none.

    Raises:
        ConfigError: as there.
    """
    try:
        config = TreeSpecConfig.parse(
            {"num_speculative_tokens": sizes.num_nodes, **raw}
        )
    except ConfigError:  # it may be the nodes that other options take for granted
        config = TreeSpecConfig.parse(raw)
    sized = config.to_dict()
    tree = sized["tree"]
    if config.max_rows is None:
        tree["max_rows"] = max(sizes.max_rows, config.num_speculative_tokens + 1)
    if config.min_probability is None:
        tree["min_probability"] = sizes.min_probability
    return TreeSpecConfig.parse(sized)
