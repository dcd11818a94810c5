"""Draw the main tables of benchmarks/results as pictures, for the README.

    pip install matplotlib
    python benchmarks/plot_results.py [--output docs/plots]

Each picture says on which machine its table was made. Times of a table that was made
without a GPU are left out: they are the interpreter's.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
PROPOSERS = ("ngram", "suffix", "recycle", "recycle_suffix")
NO_SPECULATION, OURS = "none", "treespec"


class Table(NamedTuple):
    title: str
    machine: str
    rows: list[dict[str, str]]

    @property
    def is_timed(self) -> bool:
        return not self.machine.startswith("CPU")

    def column(self, name: str) -> list[str]:
        """Its values, each once, in the table's order."""
        return list(dict.fromkeys(row[name] for row in self.rows))


def tables(path: Path) -> Iterator[Table]:
    """As ``print_table`` writes them: a title, a machine, an empty line, the table."""
    pattern = r"^(\S.*)\n(.*torch.*)\n\n((?:\|.*\n?)+)"
    for title, machine, body in re.findall(pattern, path.read_text(), re.MULTILINE):
        header, _, *lines = (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in body.strip().splitlines()
        )
        rows = [dict(zip(header, line, strict=True)) for line in lines]
        yield Table(title, machine, rows)


def find(name: str, title: str) -> Table:
    found = [each for each in tables(RESULTS / f"{name}.md") if each.title == title]
    if len(found) != 1:
        raise SystemExit(f"{name}.md has {len(found)} tables called {title!r}, not 1")
    return found[0]


def draw_proposers() -> Any:
    table = find("recycle", "Accepted draft tokens per step")
    texts = table.column("text")
    figure, axes = pyplot.subplots(1, len(texts), figsize=(10, 3.2))
    for text, axis in zip(texts, axes, strict=True):
        rows = [row for row in table.rows if row["text"] == text]
        for name in PROPOSERS:
            nodes, accepted = zip(
                *((int(row["nodes"]), float(row[name])) for row in rows), strict=True
            )
            label = name.replace("_", " + ")
            axis.plot(nodes, accepted, marker="o", markersize=3, label=label)
        axis.set(title=text, xscale="log", xticks=nodes, ylim=(0, None))
        axis.set_xticks(nodes, nodes)
        axis.minorticks_off()
        axis.set_xlabel("tree nodes")
    axes[0].set_ylabel("accepted drafts per step")
    axes[0].legend(frameon=False, fontsize=8)
    return finished(figure, "Proposers without a model, replayed text", table)


def draw_serving() -> Any:
    table = find("serving", "Serving")
    shown = {"tokens_per_step": "tokens per forward pass of the target"}
    if table.is_timed:
        shown["speed_up"] = "speed-up over no speculation"
    settings = [(t, b) for t in table.column("T") for b in table.column("batch")]
    methods = table.column("method")
    figure, axes = pyplot.subplots(
        len(shown),
        len(settings),
        figsize=(2.6 * len(settings), 3.2 * len(shown)),
        squeeze=False,
        sharey="row",
        sharex="row",
    )
    colours = [
        "0.6" if each == NO_SPECULATION else "C0" if each.startswith(OURS) else "C1"
        for each in methods
    ]
    for row_of_axes, (column, label) in zip(axes, shown.items(), strict=True):
        for axis, (temperature, batch) in zip(row_of_axes, settings, strict=True):
            values = {
                row["method"]: float(row[column].split()[0])
                for row in table.rows
                if (row["T"], row["batch"]) == (temperature, batch)
            }
            axis.barh(methods, [values[each] for each in methods], color=colours)
            axis.set_title(f"T={float(temperature):g}, batch {batch}", fontsize=9)
        row_of_axes[0].invert_yaxis()  # of all: they share it
        row_of_axes[0].set_xlabel(label, loc="left", fontsize=9)
        row_of_axes[0].tick_params(axis="y", labelsize=8)
    return finished(figure, "Trees (blue) and vLLM's chains (orange)", table)


def finished(figure: Any, title: str, table: Table) -> Any:
    figure.suptitle(title, fontsize=11)
    figure.text(0.995, 0.01, table.machine, ha="right", fontsize=6, color="0.4")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    docs = Path(__file__).parents[1] / "docs/plots"
    parser.add_argument("--output", type=Path, default=docs, help="a directory")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in (("proposers", draw_proposers), ("serving", draw_serving)):
        draw().savefig(output / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
