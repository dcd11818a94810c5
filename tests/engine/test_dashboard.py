"""The dashboard and the alerts, asked of a Prometheus that watches a real server."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import openai
import pytest
import yaml

from tests.engine.servers import PROMPT, TARGET, TREE, connect
from vllm_treespec.integration.metrics import SERIES
from vllm_treespec.testing.servers import free_port, serving

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "docs/grafana/alerts.yml"
PROGRAMS = ROOT / "build/prometheus"
needs_prometheus = pytest.mark.skipif(
    shutil.which("apt-get") is None, reason="Prometheus is Debian's package here"
)


def load_tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None and spec.loader is not None, "it is a Python file"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw_dashboard = load_tool("draw_dashboard")
PANELS = list(draw_dashboard.panels(json.loads(draw_dashboard.DASHBOARD.read_text())))


def own_series(query: str) -> set[str]:
    """Names as in ``SERIES`` of those of ours that a query asks for."""
    found = re.findall(r"vllm:treespec_(\w+)", query)
    return {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in found}


def test_every_series_is_in_a_panel_and_no_panel_asks_for_another():
    shown = set().union(
        *(
            own_series(target["expr"])
            for panel in PANELS
            for target in panel.get("targets", ())
        )
    )
    declared = {series.name for series in SERIES}
    assert shown == declared


@needs_prometheus
def test_alerts_fire_on_their_trouble_and_on_nothing_else():
    install_prometheus()
    for command in (
        ["check", "rules", str(ALERTS)],
        ["test", "rules", str(Path(__file__).with_name("alerts.yml"))],
    ):
        result = subprocess.run(
            [PROGRAMS / "promtool", *command], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr


@needs_prometheus
def test_every_query_has_data_of_a_real_server(tmp_path: Path):
    install_prometheus()
    with (
        serving(TARGET, TREE, tmp_path / "server.log") as server,
        watching(server.port, tmp_path) as view,
        connect(server) as client,
    ):
        deadline = time.monotonic() + 60
        while True:
            ask(client)
            empty = without_data(replace(view, end=time.time()))
            if not empty or time.monotonic() > deadline:
                break
    assert not empty


def ask(client: openai.OpenAI) -> None:
    for temperature in (0.0, 0.8):
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=32, temperature=temperature
        )
    time.sleep(2)  # scrapes


def without_data(view: Any) -> list[str]:
    """Panels and alerts with a query that is answered by no number."""
    asked = {
        f"{panel['title']}: {target['legendFormat']}": target
        for panel in PANELS
        for target in panel.get("targets", ())
    } | dict(alert_values())
    return [
        name
        for name, target in asked.items()
        if not any(
            math.isfinite(value)
            for _, _, values in view.curves(target)
            for value in values
        )
    ]


def alert_values() -> Iterator[tuple[str, dict[str, Any]]]:
    """What alerts compare with their limits, as a panel's query."""
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            value, limits = re.subn(r"\s[<>] [\d.]+\s*$", "", rule["expr"])
            assert limits == 1, f"{rule['alert']} ends with no limit"
            yield rule["alert"], {"expr": value, "legendFormat": "", "instant": True}


def install_prometheus() -> None:
    subprocess.run(["bash", ROOT / "tools/prometheus.sh", PROGRAMS], check=True)


@contextmanager
def watching(port: int, directory: Path) -> Iterator[Any]:
    """A Prometheus that scrapes the server every second; yields a view of it."""
    config, own_port = directory / "prometheus.yml", free_port()
    job = {"job_name": "vllm", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
    config.write_text(
        json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]})
    )
    start, url = time.time(), f"http://127.0.0.1:{own_port}"
    process = subprocess.Popen(
        [
            *(PROGRAMS / "prometheus", f"--config.file={config}"),
            *(f"--storage.tsdb.path={directory / 'data'}", "--log.level=warn"),
            f"--web.listen-address=127.0.0.1:{own_port}",
        ]
    )
    view = draw_dashboard.View(
        prometheus=url, model_name="tiny", start=start, end=start + 1
    )
    try:
        wait_for(lambda: b'"1"' in urlopen(f"{url}/api/v1/query?query=up").read())
        yield view
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except URLError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s")
