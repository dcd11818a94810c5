#!/usr/bin/env bash
# Make a virtual environment with this project, vLLM and the development tools.
# usage: PYTHON=python3 tools/install.sh DIRECTORY
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
if command -v nvidia-smi >/dev/null; then
    total_mb=11000
else
    total_mb=3600
fi

progress() {  # until killed: what is there of what will be
    while sleep 10; do
        # Files come and go under du, which then fails.
        mb=$({ du -sm "$venv" 2>/dev/null || true; } | cut -f1)
        printf '  %5d of about %d MB, %d s\n' "$mb" "$total_mb" "$SECONDS" >&2
    done
}

echo "Installing vLLM and tools into $venv: about $total_mb MB, 2 to 10 minutes." >&2
"${PYTHON:-python3}" -m venv --clear "$venv"
pip="$venv/bin/pip --disable-pip-version-check"
progress &
trap "kill $! 2>/dev/null || true" EXIT
if command -v nvidia-smi >/dev/null; then
    $pip install -q -e '.[cuda,dev]'
else
    # Before anything asks for plain torch, which would be the CUDA build.
    $pip install -q torch==2.13.0
    $pip install -q -e '.[cpu,dev]' ./tools/cpu_host ./tools/vllm_alias
    # CUDA builds that vLLM's wheel asks for: beside a CPU torch they break transformers.
    $pip uninstall -q -y torchvision torchaudio torchcodec
fi
