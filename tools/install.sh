#!/usr/bin/env bash
# Make a virtual environment with this project, vLLM and the development tools.
# usage: PYTHON=python3 tools/install.sh DIRECTORY
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
"${PYTHON:-python3}" -m venv --clear "$venv"
pip="$venv/bin/pip --disable-pip-version-check"
if command -v nvidia-smi >/dev/null; then
    $pip install -q -e '.[cuda,dev]'
else
    # Before anything asks for plain torch, which would be the CUDA build.
    $pip install -q torch==2.13.0
    $pip install -q -e '.[cpu,dev]' ./tools/cpu_host ./tools/vllm_alias
    # CUDA builds that vLLM's wheel asks for: beside a CPU torch they break transformers.
    $pip uninstall -q -y torchvision torchaudio torchcodec
fi
