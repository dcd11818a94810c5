"""vLLM as it comes, beside this plugin and the CPU tooling, with no variable set."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 24}
    llm = LLM(sys.argv[1], max_model_len=64, skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    answer = llm.generate({"prompt_token_ids": [5, 6, 7]}, sampling)[0].outputs[0]
    print("answer:", len(answer.token_ids))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU's drivers")
def test_vllms_default_runner_starts(model_path, tmp_path):
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("VLLM_", "TRITON_"))
    }
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), model_path("llama")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "answer: 4" in done.stdout, done.stderr[-3000:]
