"""Two tensor-parallel ranks, each a process, draft and verify the same trees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MODELS = Path(__file__).parents[2] / "models/python-stdlib"
TARGET, DRAFT = MODELS / "target", MODELS / "draft"
SCRIPT = """
import sys
from vllm import LLM, SamplingParams

PROMPTS = ["class Stack:\\n    def __init__(self):\\n", "for i in range(10):\\n"]

def table_of(worker):
    table = worker.model_runner.speculator.drafts.recycle.recycler.table
    weights = table.weights.view(-1).tolist()
    return table.token_ids.view(-1).tolist() + table.owners.tolist() + weights

def main():
    params = SamplingParams(temperature=0.0, max_tokens=24)
    answers = []
    draft = {"type": "draft_model", "model": sys.argv[2], "depth": 3, "width": 2}
    skip = {"type": "layer_skip", "depth": 2, "width": 2}
    hosted = [{"type": "suffix"}, {"type": "ngram"}]
    tree = {"proposers": [draft, skip, {"type": "recycle"}, *hosted]}
    for tree in (None, tree):
        speculative = tree and {
            "method": "treespec", "num_speculative_tokens": 8, "tree": tree}
        llm = LLM(
            sys.argv[1], tensor_parallel_size=2, speculative_config=speculative,
            dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4,
            kv_cache_memory_bytes=2**24, disable_log_stats=False)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        answers.append([output.outputs[0].token_ids for output in outputs])
        if speculative:
            first, second = llm.collective_rpc(table_of)
            assert first == second and max(first) >= 0, "each rank has its own table"
        metrics = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
        llm.llm_engine.engine_core.shutdown()
        del llm
    assert answers[0] == answers[1], answers
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 0, metrics
    # Both ranks verify, one reports.
    num_nodes = metrics["vllm:spec_decode_num_draft_tokens"]
    assert metrics["vllm:treespec_nodes_verified"] == num_nodes > 0, metrics
    print("identical")

if __name__ == "__main__":
    main()
"""


def test_two_ranks_keep_the_tokens(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(SCRIPT)
    env = {
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # asks workers for their tables
    }
    result = subprocess.run(
        [sys.executable, str(script), str(TARGET), str(DRAFT)],
        env=env,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "identical" in result.stdout
