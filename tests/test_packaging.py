"""What a package index, a cluster and a reader of the site get."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside its source
    skipped = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=skipped)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run(sys.executable, *build, "-w", str(folder), str(source))
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_of_a_package_index_has_links_that_work_there(
    wheel: zipfile.ZipFile,
) -> None:
    name = next(each for each in wheel.namelist() if each.endswith("/METADATA"))
    metadata = message_from_string(wheel.read(name).decode())
    urls = dict(each.split(", ") for each in metadata.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Issues"} <= set(urls)
    assert metadata.get_all("Classifier")
    links = re.findall(r"\]\(([^)]*)\)", str(metadata.get_payload()))
    assert links
    assert all(link.startswith(("https://", "#")) for link in links), links
    for link in links:
        if link.startswith(urls["Homepage"] + "/"):
            path = re.sub(r"^.*?/(blob|raw)/main/", "", link).split("#")[0]
            assert (ROOT / path).exists(), link


def test_the_wheel_has_the_plugin_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_treespec"}
    assert "vllm_treespec/kernels/tree_attention.py" in wheel.namelist()


def test_the_dockerfile_is_clean() -> None:
    run(str(BIN / "hadolint"), "deploy/Dockerfile")


def test_the_manifest_is_what_kubernetes_expects() -> None:
    run(str(BIN / "kubernetes-validate"), "--strict", "deploy/kubernetes.yaml")


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    run("make", "-s", "build/docs", f"VENV={BIN.parent}")
    site = tmp_path / "site"
    run(str(BIN / "mkdocs"), "build", "-q", "--strict", "-d", str(site))
    assert "TreeSpecConfig" in (site / "docs/api/index.html").read_text()
