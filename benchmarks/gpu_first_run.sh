#!/usr/bin/env bash
# The first run on a GPU, at most 9 minutes: what must be right first, then what is fast.
#
#     benchmarks/gpu_first_run.sh FOLDER
#
# Needs vllm_treespec installed beside vLLM, and no network. Writes one Markdown file per
# step and README.md, with what passed, to FOLDER. Without a GPU it is a miniature.
# MINUTES sets another limit, PYTHON another interpreter.
set -u
if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER (results go there)" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
limit=$((${MINUTES:-9} * 60))
export PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 VLLM_GPU_SYNC_CHECK=${VLLM_GPU_SYNC_CHECK:-warn}
# Before torch and Triton are imported: deterministic cuBLAS, and no warning as error.
export CUBLAS_WORKSPACE_CONFIG=:4096:8 TRITON_DEFAULT_FP_FUSION=1
machine=$("$python" -c 'from vllm_treespec.testing.bench import machine; print(machine())') || exit 1
has_gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
{
    echo "# First run"
    echo
    echo "$machine"
    echo
    echo "| step | seconds | result |"
    echo "| --- | ---: | --- |"
} >"$out/README.md"
number=0
failures=0

# step NAME SECONDS COMMAND...: no longer than that, nor than what is left of all
step() {
    local name=$1 most=$2 begin=$SECONDS left=$((limit - SECONDS)) result
    shift 2
    number=$((number + 1))
    local file
    file=$out/$(printf '%02d' $number)-$name.md
    if [ $left -lt 5 ]; then
        result="no time was left" failures=$((failures + 1))
    else
        {
            echo "# $name"
            echo
            echo "$machine"
            echo
            echo '```'
            echo "$*"
        } >"$file"
        timeout -k 5 $((most < left ? most : left)) "$@" >>"$file" 2>&1
        local status=$?
        echo '```' >>"$file"
        case $status in
        0) result=passed ;;
        124 | 137) result="not done within its time" failures=$((failures + 1)) ;;
        *) result="exit status $status" failures=$((failures + 1)) ;;
        esac
    fi
    echo "| $name | $((SECONDS - begin)) | $result |" | tee -a "$out/README.md"
}

tests() { step "$1" "$2" "$python" -m pytest -q -p no:cacheprovider "${@:3}"; }

if [ "$has_gpu" = 1 ]; then
    step check 30 "$python" -m vllm_treespec check
    tests kernels 90 tests/kernels --ignore tests/kernels/test_compiles.py
    step eager-suffix 40 "$python" benchmarks/first_engine.py suffix --eager
    for proposer in suffix recycle draft_model layer_skip; do
        step "graphs-$proposer" 50 "$python" benchmarks/first_engine.py "$proposer"
    done
    if command -v compute-sanitizer >/dev/null; then
        tests_of="tests/kernels/test_walk_tree.py tests/kernels/test_grow_paths.py"
        # shellcheck disable=SC2086
        step sanitizer 60 compute-sanitizer --error-exitcode 9 \
            "$python" -m pytest -q -p no:cacheprovider $tests_of -k matches
    fi
    step attention 90 "$python" benchmarks/bench_tree_attention.py
    step steps 90 "$python" benchmarks/bench_step.py
    step serving 150 "$python" benchmarks/bench_serving.py --minutes 1.5
else
    step check 240 "$python" -m vllm_treespec check
    tests kernels 240 tests/kernels/test_read_nodes.py
    for proposer in ${PROPOSERS:-suffix}; do
        step "eager-$proposer" 300 "$python" benchmarks/first_engine.py "$proposer" --eager
    done
    step attention 240 "$python" benchmarks/bench_tree_attention.py
fi
exit $((failures > 0))
