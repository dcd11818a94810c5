"""Writes the tables of options in README.md and docs/ from their declarations.

``python tools/option_tables.py`` rewrites what stands between ``<!-- options: NAME -->``
and ``<!-- end -->``, where NAME is a type of proposer, or ``tree``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vllm_treespec.config import PROPOSERS, TreeSpecConfig

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLE = re.compile(r"(?s)(<!-- options: (\w+) -->\n).*?(<!-- end -->)")


def with_tables(page: str) -> str:
    """The page, with its tables as they should be."""
    return TABLE.sub(lambda found: found[1] + _table(found[2]) + found[3], page)


def _table(name: str) -> str:
    if name == "tree":
        outer = TreeSpecConfig.json_schema()["properties"]
        options = {name: outer[name] for name in ("num_speculative_tokens",)}
        inner = outer["tree"]["properties"]
        options |= {f"tree.{name}": each for name, each in inner.items()}
    else:
        options = PROPOSERS[name].model_json_schema()["properties"]
        del options["type"]
    rows = ["| option | default | values | meaning |", "| --- | --- | --- | --- |"]
    for option, schema in options.items():
        default = f"`{json.dumps(schema['default'])}`" if "default" in schema else ""
        cells = (f"`{option}`", default, _values(schema), _meaning(schema))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _values(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_values(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    kind = {"array": "list", "null": "`null`", "boolean": "`true`, `false`"}
    bounds = [schema.get("minimum"), schema.get("maximum")]
    if any(bound is not None for bound in bounds):
        low, high = ("" if bound is None else f"{bound:,}" for bound in bounds)
        return (
            f"{low} to {high}"
            if low and high
            else f"from {low}"
            if low
            else f"up to {high}"
        )
    return kind.get(schema.get("type", ""), schema.get("type", "object"))


def _meaning(schema: dict[str, Any]) -> str:
    return " ".join(schema["description"].split()).replace("``", "`").rstrip(".")


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
