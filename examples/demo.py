"""make demo: the real engine with and without trees, side by side.

    python examples/demo.py [--nodes 16] [--max-tokens 64] [--model PATH]

Runs on a GPU where vLLM finds one, else on the CPU.
"""

from __future__ import annotations

import os

if not os.path.exists("/dev/nvidiactl"):
    # A CPU interprets Triton kernels; ours run as their torch twins.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

from vllm_treespec.core.observe import draw_tree, walk

MODELS = Path(__file__).parents[1] / "models" / "python-stdlib"
PROMPTS = {
    "write a parser": """import argparse


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--output",""",
    "repeat a pattern": """class TestMath(unittest.TestCase):
    def test_add(self):
        self.assertEqual(add(1, 2), 3)

    def test_sub(self):
        self.assertEqual(sub(3, 2), 1)

    def test_mul(self):
""",
    "edit a function": """# before
def read_lines(path):
    with open(path) as file:
        lines = file.readlines()
    return [line.strip() for line in lines]

# after
def read_lines(path):
    with open(path)""",
    "open text": "def __init__(self, name, value=None):\n",
}


@dataclass
class Answer:
    """One prompt's greedy answer and what it cost."""

    token_ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # tokens emitted by each
    seconds: float = 0.0
    trees: list[dict[str, Any]] = field(default_factory=list)  # verified by each


def main() -> None:
    parser = argparse.ArgumentParser(description="with and without tree speculation")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--model", default=str(MODELS / "target"))
    options = parser.parse_args()

    plain = answer_all(options.model, None, options.max_tokens)
    speculative = {
        "method": "treespec",
        "num_speculative_tokens": options.nodes,
        "tree": {"proposers": [{"type": "suffix"}, {"type": "ngram"}]},
    }
    tree = answer_all(options.model, speculative, options.max_tokens)

    device = current_platform.get_device_name()
    print(f"\n{Path(options.model).name} on {device}, {options.nodes} nodes a tree\n")
    print_table(plain, tree)
    print_best_tree(options.model, tree)
    if any(plain[name].token_ids != tree[name].token_ids for name in PROMPTS):
        raise SystemExit("tokens differ: this is a bug, please report it")


def answer_all(
    model: str, speculative: dict[str, Any] | None, max_tokens: int
) -> dict[str, Answer]:
    on_cpu = current_platform.is_cpu()
    llm = LLM(
        model=model,
        speculative_config=speculative,
        # Half precision rounds one row and a tree of rows differently, and a near tie
        # may then fall the other way; this table is about the algorithm.
        dtype="float32",
        enforce_eager=on_cpu,
        max_model_len=1024,
        max_num_seqs=4,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        use_tqdm_on_load=False,
        # The default is a share of the whole device, too much for a small model.
        kv_cache_memory_bytes=2**28,
    )
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    # The first steps compile; they are not what is compared.
    answer(llm, "warm-up", "def warm_up():", params, has_trees=False)
    answers = {
        name: answer(llm, name, prompt, params, speculative is not None)
        for name, prompt in PROMPTS.items()
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return answers


def answer(
    llm: LLM, name: str, prompt: str, params: SamplingParams, has_trees: bool
) -> Answer:
    engine = llm.llm_engine
    engine.add_request(name, prompt, params)
    result = Answer()
    tree: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = engine.step()
        result.seconds += time.perf_counter() - start
        for output in outputs:
            token_ids = list(output.outputs[0].token_ids)
            result.steps.append(len(token_ids) - len(result.token_ids))
            result.trees.append(tree)
            result.token_ids = token_ids
        if has_trees:  # what the next step will verify
            trees = llm.collective_rpc("treespec_trees")[0]
            tree = next(iter(trees.values()), {})
    return result


def print_table(plain: dict[str, Answer], tree: dict[str, Answer]) -> None:
    header = "prompt", "tokens", "identical", "steps", "tree steps", "accept len"
    rows = [(*header, "plain s", "tree s", "speed-up")]
    total = Answer(), Answer()
    for name in PROMPTS:
        rows.append(row(name, plain[name], tree[name]))
        for whole, part in zip(total, (plain[name], tree[name]), strict=True):
            whole.token_ids += part.token_ids
            whole.steps += part.steps
            whole.seconds += part.seconds
    rows.append(row("all", *total))
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    for number, line in enumerate(rows):
        cells = [line[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        print("| " + " | ".join(cells) + " |")
        if number == 0:
            rules = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
            print("| " + " | ".join(rules) + " |")
    print(
        "\nsteps: forward passes of the target. accept len: tokens emitted per step, "
        "bonus\ntoken included."
    )
    if current_platform.is_cpu():
        print(
            "Times on a CPU are those of Triton's interpreter, which runs vLLM's own "
            "sampling\nkernels once per tree node; they say nothing about a GPU."
        )


def row(name: str, plain: Answer, tree: Answer) -> tuple[str, ...]:
    identical = "yes" if plain.token_ids == tree.token_ids else "NO"
    accept_len = len(tree.token_ids) / len(tree.steps)
    return (
        name,
        str(len(plain.token_ids)),
        identical,
        str(len(plain.steps)),
        str(len(tree.steps)),
        f"{accept_len:.2f}",
        f"{plain.seconds:.2f}",
        f"{tree.seconds:.2f}",
        f"{plain.seconds / tree.seconds:.2f}x",
    )


def print_best_tree(model: str, answers: dict[str, Answer]) -> None:
    """Draw the tree whose accepted path was the longest among those with branches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    best: tuple[int, str, dict[str, Any], list[int]] | None = None
    for name, each in answers.items():
        end = 0
        for tree, count in zip(each.trees, each.steps, strict=True):
            emitted = each.token_ids[end : end + count]
            end += count
            if not tree or len(set(tree["parents"])) == len(tree["parents"]):
                continue  # no tree, or one without a branch
            path = walk(tree["token_ids"], tree["parents"], emitted)
            off_first = path != list(range(1, len(path) + 1))
            score = len(path) + 10 * off_first
            if best is None or score > best[0]:
                best = score, name, tree, path
    if best is None:
        print("\nno tree had a branch")
        return
    _, name, tree, path = best
    labels = [repr(tokenizer.decode([token])) for token in tree["token_ids"]]
    proposers = [" + ".join(names) for names in tree["proposers"]]
    width = max(len(label) for label in labels) + 2
    labels = ["(root)"] + [
        f"{label:{width}}{who}"
        for label, who in zip(labels[1:], proposers[1:], strict=True)
    ]
    print(f"\nA tree of '{name}', accepted path marked *\n")
    print(draw_tree(labels, tree["parents"], path))


if __name__ == "__main__":
    main()
