"""Draw the Grafana dashboard as a picture, from the Prometheus that Grafana would ask.

    pip install matplotlib
    python tools/draw_dashboard.py --prometheus http://127.0.0.1:9090 --model NAME \\
        --minutes 5 --output docs/grafana/treespec.png

Reads the panels and queries of docs/grafana/treespec.json and draws the kinds of panels
that are in it: rows, stats, time series and heatmaps.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

DASHBOARD = Path(__file__).parents[1] / "docs/grafana/treespec.json"
Panel = dict[str, Any]
Curve = tuple[str, list[float], list[float]]  # legend, Unix seconds, values


@dataclass(frozen=True, kw_only=True)
class View:
    """What Grafana shows: a model and a span of time, from one Prometheus."""

    prometheus: str  # http://host:port
    model_name: str
    start: float  # Unix seconds
    end: float
    scrape_seconds: float = 1.0

    @property
    def step(self) -> float:
        """Seconds between two points of a curve, never less than between scrapes."""
        return max(self.scrape_seconds, (self.end - self.start) / 200)

    def fill(self, text: str) -> str:
        """Put in what Grafana puts in for its variables."""
        window = max(self.step + self.scrape_seconds, 4 * self.scrape_seconds)
        variables = {
            "model_name": self.model_name,
            "__rate_interval": f"{math.ceil(window)}s",
            "__range": f"{math.ceil(self.end - self.start)}s",
        }
        return re.sub(r"\$(\w+)", lambda found: variables[found[1]], text)

    def curves(self, target: Panel) -> list[Curve]:
        """What a panel's query says; only the last value if it asks for no more."""
        query: dict[str, Any] = {"query": self.fill(target["expr"])}
        if target.get("instant"):
            results = self._ask("query", {**query, "time": self.end})
        else:
            span = {"start": self.start, "end": self.end, "step": self.step}
            results = self._ask("query_range", {**query, **span})
        return [_curve(result, target["legendFormat"]) for result in results]

    def _ask(self, endpoint: str, parameters: dict[str, Any]) -> list[Any]:
        url = f"{self.prometheus}/api/v1/{endpoint}?{urlencode(parameters)}"
        with urlopen(url) as response:
            results: list[Any] = json.load(response)["data"]["result"]
        return results


def _curve(result: Any, legend: str) -> Curve:
    name = re.sub(r"{{(\w+)}}", lambda found: result["metric"][found[1]], legend)
    points = result.get("values") or [result["value"]]
    return name, [float(when) for when, _ in points], [float(y) for _, y in points]


def panels(dashboard: Panel) -> Iterator[Panel]:
    """Rows and the panels in them, those of folded rows too."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())


GROUND, PANEL, GRID, TEXT, FAINT = "#111217", "#181b1f", "#2c3235", "#ccccdc", "#8e8e9e"
PALETTE = (
    *("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42"),
    *("#1f78c1", "#ba43a9", "#705da0", "#508642"),
)
NAMED = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c", "text": TEXT}
WIDTH, UNIT = 17.0, 0.34  # inches: of the picture, of a unit of height


def formatted(value: float, unit: str, decimals: int | None = None) -> str:
    """A number as Grafana writes it."""
    if unit == "percentunit":
        return f"{100 * value:.{decimals or 0}f}%"
    if unit == "s" and 0 < value < 1:
        return f"{1000 * value:.3g} ms"
    suffix = " s" if unit == "s" else ""
    if decimals is not None:
        return f"{value:.{decimals}f}{suffix}"
    return (f"{value / 1000:.3g} K" if value >= 1000 else f"{value:.3g}") + suffix


class Picture:
    """A matplotlib figure with the dashboard's grid: 24 columns, units of height."""

    def __init__(self, dashboard: Panel, view: View) -> None:
        from matplotlib.figure import Figure  # not needed to ask

        self._view = view
        grid = [panel["gridPos"] for panel in panels(dashboard)]
        self._height = max(pos["y"] + pos["h"] for pos in grid)
        self.figure = Figure((WIDTH, self._height * UNIT), facecolor=GROUND)
        for panel in panels(dashboard):
            getattr(self, f"_{panel['type']}")(panel)

    def _box(self, panel: Panel) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a panel, in inches."""
        pos, column = panel["gridPos"], WIDTH / 24
        bottom = (self._height - pos["y"] - pos["h"]) * UNIT
        return pos["x"] * column, bottom, pos["w"] * column, pos["h"] * UNIT

    def _axes(self, *box: float, **options: Any) -> Any:
        height = self._height * UNIT
        left, bottom, width, tall = box
        return self.figure.add_axes(
            (left / WIDTH, bottom / height, width / WIDTH, tall / height), **options
        )

    def _frame(self, panel: Panel) -> Any:
        """Axes over all of a panel, in inches, with its title."""
        left, bottom, width, height = self._box(panel)
        gap = 0.04
        frame = self._axes(left + gap, bottom + gap, width - 2 * gap, height - 2 * gap)
        frame.set(
            facecolor=PANEL, xlim=(0, width), ylim=(0, height), xticks=[], yticks=[]
        )
        frame.spines[:].set_color(GRID)
        frame.text(0.1, height - 0.22, panel["title"], color=TEXT, size=9, va="center")
        return frame

    def _row(self, panel: Panel) -> None:
        left, bottom, width, height = self._box(panel)
        frame = self._axes(left, bottom, width, height)
        frame.axis("off")
        frame.text(
            *(0.006, 0.45, panel["title"]),
            color=TEXT,
            size=11,
            weight="bold",
            va="center",
        )

    def _curves(self, panel: Panel) -> list[Curve]:
        found = [self._view.curves(target) for target in panel["targets"]]
        return [
            curve
            for each in found
            for curve in each
            if any(map(math.isfinite, curve[2]))
        ]

    def _no_data(self, panel: Panel) -> None:
        _, _, width, height = self._box(panel)
        self._frame(panel).text(
            *(width / 2, height / 2, "No data"), color=FAINT, size=11, ha="center"
        )

    def _stat(self, panel: Panel) -> None:
        curves = self._curves(panel)
        if not curves:
            return self._no_data(panel)
        _, _, width, height = self._box(panel)
        value, defaults = curves[0][2][-1], panel["fieldConfig"]["defaults"]
        color = [
            step["color"]
            for step in defaults["thresholds"]["steps"]
            if step["value"] is None or value >= step["value"]
        ][-1]
        self._frame(panel).text(
            *(width / 2, height * 0.42),
            formatted(value, defaults["unit"], defaults.get("decimals")),
            color=NAMED[color],
            size=26,
            weight="bold",
            ha="center",
            va="center",
        )

    def _plot(self, panel: Panel, below: float = 0.0) -> Any:
        """Axes for curves inside a panel, ``below`` inches left for the legend."""
        self._frame(panel)
        left, bottom, width, height = self._box(panel)
        plot = self._axes(
            *(left + 0.55, bottom + 0.38 + below, width - 0.7, height - 0.83 - below)
        )
        plot.set(facecolor=PANEL)
        plot.spines[:].set_visible(False)
        plot.grid(color=GRID, linewidth=0.6)
        plot.tick_params(colors=FAINT, labelsize=7.5, length=0)
        ticks = [
            self._view.start + (self._view.end - self._view.start) * part / 8
            for part in (1, 3, 5, 7)
        ]
        plot.set_xticks(
            ticks, [time.strftime("%H:%M:%S", time.gmtime(t)) for t in ticks]
        )
        plot.set_xlim(self._view.start, self._view.end)
        return plot

    def _timeseries(self, panel: Panel) -> None:
        curves = self._curves(panel)
        if not curves:
            return self._no_data(panel)
        defaults = panel["fieldConfig"]["defaults"]
        longest = max(len(name) for name, _, _ in curves)
        columns = min(len(curves), int(self._box(panel)[2] / (0.45 + 0.065 * longest)))
        rows = math.ceil(len(curves) / columns)
        plot = self._plot(panel, below=0.17 * rows)
        if defaults["custom"].get("stacking"):
            self._stacked(plot, curves)
        else:
            self._lines(plot, curves)
        plot.set_ylim(defaults.get("min"), defaults.get("max"))
        plot.yaxis.set_major_formatter(lambda y, _: formatted(y, defaults["unit"]))
        legend = plot.legend(
            loc="upper left", bbox_to_anchor=(-0.12, -0.13), ncols=columns, frameon=False,
            fontsize=7.5, handlelength=1.2, columnspacing=1.2, labelspacing=0.25,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_color(TEXT)

    def _lines(self, plot: Any, curves: list[Curve]) -> None:
        for (name, when, values), color in zip(curves, PALETTE * 2, strict=False):
            shown = [y if math.isfinite(y) else math.nan for y in values]
            plot.plot(when, shown, color=color, linewidth=1.1, label=name)
            plot.fill_between(when, shown, color=color, alpha=0.06, linewidth=0)

    def _stacked(self, plot: Any, curves: list[Curve]) -> None:
        whens = sorted({t for _, when, _ in curves for t in when})
        heights = []
        for _, when, values in curves:
            known = dict(zip(when, values, strict=True))
            heights.append([known.get(t, math.nan) for t in whens])
        names = [name for name, _, _ in curves]
        plot.stackplot(whens, heights, labels=names, colors=PALETTE, alpha=0.75)

    def _heatmap(self, panel: Panel) -> None:
        curves = self._curves(panel)
        if not curves:
            return self._no_data(panel)
        curves.sort(key=lambda curve: float(curve[0]))
        plot = self._plot(panel)
        # Prometheus's buckets hold all that is in smaller ones.
        counts = [values for _, _, values in curves]
        own = [counts[0]] + [
            [y - below for y, below in zip(row, last, strict=True)]
            for last, row in pairwise(counts)
        ]
        plot.grid(False)
        edges = [t - self._view.step / 2 for t in curves[0][1]]
        edges.append(edges[-1] + self._view.step)
        plot.pcolormesh(edges, range(len(own) + 1), own, cmap="inferno")
        plot.set_yticks(
            [row + 0.5 for row in range(len(own))], [name for name, _, _ in curves]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--model", required=True, help="model_name of the series")
    parser.add_argument("--minutes", type=float, default=5.0, help="shown, up to now")
    parser.add_argument("--scrape-seconds", type=float, default=1.0)
    parser.add_argument("--output", type=Path, required=True, help="a PNG")
    options = parser.parse_args()
    from PIL import Image  # comes with matplotlib

    now = time.time()
    view = View(
        prometheus=options.prometheus,
        model_name=options.model,
        start=now - 60 * options.minutes,
        end=now,
        scrape_seconds=options.scrape_seconds,
    )
    picture = Picture(json.loads(DASHBOARD.read_text()), view)
    picture.figure.savefig(options.output, dpi=100)
    # A fourth of the size, and nobody sees it.
    Image.open(options.output).quantize(96).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
