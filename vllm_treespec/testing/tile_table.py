"""Writes the table of tree attention's tiles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from vllm_treespec.kernels.attention_plan import TABLE


def write_table(about: str, tables: Mapping[str, Iterable[Mapping[str, int]]]) -> None:
    """One entry a line, so that changes can be read."""
    parts = [f'  "about": {json.dumps(about)}']
    for name, entries in tables.items():
        lines = ",\n    ".join(json.dumps(entry) for entry in entries)
        parts.append(f'  "{name}": [\n    {lines}\n  ]' if lines else f'  "{name}": []')
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")
