"""Writes the table of tree attention's tiles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from vllm_treespec.kernels.attention_plan import TABLE


def write_table(about: str, tiles: Iterable[Mapping[str, int]]) -> None:
    """One entry a line, so that changes can be read."""
    lines = ",\n    ".join(json.dumps(entry) for entry in tiles)
    TABLE.write_text(
        f'{{\n  "about": {json.dumps(about)},\n  "tiles": [\n    {lines}\n  ]\n}}\n'
    )
