"""python benchmarks/bench_draft_trees.py [--quick]

Mean tokens per step of the target, for every shape of a draft model's tree, on the
bundled models. The target continues held-out text once; the trees are then replayed
over what it said. First the replay is held against the real engine.
"""

from __future__ import annotations

import os

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no warm-up
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import contextlib
import gc
import io
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_treespec.config import TreeSpecConfig, max_candidates
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.propose.sequoia import expected_tokens, optimal_template
from vllm_treespec.core.propose.shapes import BestFirst, FixedShape
from vllm_treespec.core.propose.suffix import SuffixProposer
from vllm_treespec.core.propose.template import TreeTemplate
from vllm_treespec.testing.bench import machine, print_table
from vllm_treespec.testing.continuations import continued, spread_prompts
from vllm_treespec.testing.replay import (
    CPU,
    MAX_DEPTH,
    NUM_RANKS,
    Alone,
    DraftModel,
    DraftSource,
    HostSource,
    Merged,
    Outcome,
    Source,
    Texts,
    measure_acceptance,
    replay,
)

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models/python-stdlib"
RESULTS = ROOT / "benchmarks/results/draft_trees.md"
sys.path.insert(0, str(ROOT / "models"))

import train  # noqa: E402 (found through the line above)

PROMPT_LEN = 64
DRAFTS = ("draft", "draft_small")
TEMPERATURES = {"greedy": 0.0, "T=1": 1.0}
CHAINS = (2, 4, 8, 16)
MERGED_DEPTH = 4
# Two implementations read the same text, so only near ties may differ.
TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is replayed."""

    num_prompts: int = 48
    num_tokens: int = 96
    node_counts: tuple[int, ...] = (4, 8, 16, 32, 64)
    depths: tuple[int, ...] = (2, 4, 8)
    merged_node_counts: tuple[int, ...] = (16, 32, 64)
    engine_prompts: int = 6
    engine_tokens: int = 96


QUICK = Size(
    num_prompts=8,
    num_tokens=32,
    node_counts=(4, 16),
    depths=(4,),
    merged_node_counts=(16,),
    engine_prompts=2,
    engine_tokens=24,
)


# ----------------------------------------------------------------------------- texts
def held_out_prompts(num_prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """To evaluate on, and to measure acceptance and calibrate on."""
    files = [train.encode(MODELS / "target", [text]) for text in train.read_corpus()[1]]
    return spread_prompts(files, num_prompts, PROMPT_LEN)


def target_texts(prompts: torch.Tensor, num_tokens: int, temperature: float) -> Texts:
    return continued(
        prompts,
        num_tokens,
        temperature,
        model=MODELS / "target",
        kept_in=ROOT / "build",
    )


# ---------------------------------------------------------------------------- shapes
def chain(length: int) -> TreeTemplate:
    return TreeTemplate.from_branching((1,) * length)


def best_first(num_nodes: int, depth: int) -> BestFirst:
    """As wide as may matter for so many nodes."""
    return BestFirst(
        depth=depth,
        width=min(32, max(4, num_nodes // 2)),
        num_children=min(16, num_nodes),
        device=CPU,
    )


def branchings(num_nodes: int, depth: int, most: int) -> Iterator[tuple[int, ...]]:
    """Branchings that never widen, of at most so many nodes."""
    for count in range(1, min(most, num_nodes) + 1):
        yield (count,)
        if depth > 1:
            for below in branchings(num_nodes // count - 1, depth - 1, count):
                yield (count, *below)


def best_static(
    acceptance: Sequence[float], num_nodes: int, depth: int
) -> tuple[int, ...]:
    """What a user would find who tried them all on the measured acceptance."""
    return max(
        branchings(num_nodes, depth, NUM_RANKS),
        key=lambda each: expected_tokens(TreeTemplate.from_branching(each), acceptance),
    )


# ---------------------------------------------------------------------------- replay
class Bench:
    """The drafts, and the texts of one temperature."""

    def __init__(self, size: Size, temperature: float) -> None:
        self.size = size
        prompts, other_prompts = held_out_prompts(size.num_prompts)
        self.texts = target_texts(prompts, size.num_tokens, temperature)
        self.other_texts = target_texts(other_prompts, size.num_tokens, temperature)
        self.drafts = {name: DraftModel(train.load(MODELS / name)) for name in DRAFTS}
        self.acceptance = measure_acceptance(self.drafts["draft"], self.other_texts)

    def best_first(
        self, num_nodes: int, depth: int, *, draft: str = "draft"
    ) -> DraftSource:
        shape = best_first(num_nodes, depth)
        return DraftSource(self.drafts[draft], shape, self.size.num_prompts)

    def suffix(self, num_nodes: int) -> HostSource:
        return HostSource(
            SuffixProposer(
                max_num_reqs=self.size.num_prompts,
                max_nodes=num_nodes,
                max_depth=MAX_DEPTH,
            )
        )

    def fixed(self, template: TreeTemplate) -> Outcome:
        shape = FixedShape(template, CPU)
        source = DraftSource(self.drafts["draft"], shape, self.size.num_prompts)
        return self.alone(source, template.num_nodes)

    def alone(self, source: Source, num_nodes: int) -> Outcome:
        return replay(self.texts, Alone(source, num_nodes, self.size.num_prompts))

    def merged(self, sources: Sequence[Source], num_nodes: int) -> Outcome:
        """After the other texts, as in a server that has been up for a while."""
        kernels = choose_kernels(TreeSpecConfig(), CPU)
        drafter = Merged(kernels, sources, num_nodes, self.size.num_prompts)
        replay(self.other_texts, drafter)
        return replay(self.texts, drafter)


class AgreementRow(NamedTuple):
    text: str
    draft: str
    tokens: int
    top_1: str
    top_4: str
    top_16: str


class ChainRow(NamedTuple):
    text: str
    length: int
    steps: int
    tokens_per_step: str


class ShapeRow(NamedTuple):
    text: str
    depth: int
    nodes: int
    static: str
    sequoia: str
    best_first: str
    best_first_vs_chain: str  # of the same depth
    branching: str


class MergedRow(NamedTuple):
    text: str
    nodes: int
    draft: str
    draft_small: str
    suffix: str
    both_drafts: str
    both_vs_better: str
    draft_and_suffix: str
    draft_and_suffix_vs_better: str


Outcomes = dict[tuple[Any, ...], Outcome]  # (text, shape, depth, nodes)


def shown(outcome: Outcome) -> str:
    return f"{outcome.tokens_per_step:.3f} ± {outcome.error:.3f}"


def gain(ours: Outcome, theirs: Outcome) -> str:
    ratio, error = ours.gain_over(theirs)
    return f"{ratio:.3f} ± {error:.3f}"


def agreement(bench: Bench, text: str) -> list[AgreementRow]:
    rows = []
    for name, draft in bench.drafts.items():
        rates = measure_acceptance(draft, bench.texts)
        shares = [f"{sum(rates[:count]):.1%}" for count in (1, 4, 16)]
        num_tokens = bench.texts.num_tokens * len(bench.texts.token_ids)
        rows.append(AgreementRow(text, name, num_tokens, *shares))
    return rows


def replay_chains(bench: Bench, text: str, outcomes: Outcomes) -> list[ChainRow]:
    rows = []
    for length in CHAINS:
        outcome = outcomes[text, "chain", length] = bench.fixed(chain(length))
        rows.append(
            ChainRow(text, length, int(outcome.num_steps.sum()), shown(outcome))
        )
    return rows


def replay_shapes(bench: Bench, text: str, outcomes: Outcomes) -> list[ShapeRow]:
    rows = []
    for depth, nodes in product(bench.size.depths, bench.size.node_counts):
        branching = best_static(bench.acceptance, nodes, depth)
        trees = {
            "static": bench.fixed(TreeTemplate.from_branching(branching)),
            "sequoia": bench.fixed(optimal_template(bench.acceptance, nodes, depth)),
            "best_first": bench.alone(bench.best_first(nodes, depth), nodes),
        }
        outcomes |= {(text, name, depth, nodes): each for name, each in trees.items()}
        ratio = gain(trees["best_first"], outcomes[text, "chain", depth])
        spelled = f"<{','.join(map(str, branching))}>"
        rows.append(
            ShapeRow(text, depth, nodes, *map(shown, trees.values()), ratio, spelled)
        )
    return rows


def replay_merged(bench: Bench, text: str, outcomes: Outcomes) -> list[MergedRow]:
    rows = []
    for nodes in bench.size.merged_node_counts:
        draft = bench.best_first(nodes, MERGED_DEPTH)
        small = bench.best_first(nodes, MERGED_DEPTH, draft="draft_small")
        alone = [bench.alone(source, nodes) for source in (draft, small)]
        suffix = bench.merged([bench.suffix(nodes)], nodes)
        both = bench.merged([draft, small], nodes)
        with_suffix = bench.merged(
            [draft, bench.suffix(max_candidates(2, nodes))], nodes
        )
        outcomes |= {
            (text, "merged", nodes): both,
            (text, "better", nodes): max(alone, key=lambda each: each.tokens_per_step),
        }
        better = max(alone[0], suffix, key=lambda each: each.tokens_per_step)
        rows.append(
            MergedRow(
                text,
                nodes,
                *map(shown, (*alone, suffix, both)),
                gain(both, outcomes[text, "better", nodes]),
                shown(with_suffix),
                gain(with_suffix, better),
            )
        )
    return rows


# ---------------------------------------------------------------------------- checks
class EngineRow(NamedTuple):
    method: str
    same_text: str
    engine_steps: int
    replay_steps: int
    engine: str
    replay: str
    difference: str


def engine_rows(size: Size) -> list[EngineRow]:
    """The same prompts, decoded by vLLM and replayed."""
    prompts = held_out_prompts(size.num_prompts)[0][: size.engine_prompts]
    texts = target_texts(prompts, size.engine_tokens, 0.0)
    model = str(MODELS / "draft")
    shape = {"depth": 4, "width": 8, "top_k": 8}
    proposer = {"type": "draft_model", "model": model, **shape}
    tree = {"adaptive": False, "max_rows": 2**16, "proposers": [proposer]}
    settings = {
        "draft_model": ({"model": model}, 4, FixedShape(chain(4), CPU)),
        "treespec": (
            {"tree": tree},
            16,
            BestFirst(depth=4, width=8, num_children=8, device=CPU),
        ),
    }
    draft, rows = DraftModel(train.load(MODELS / "draft")), []
    for method, (options, nodes, grown) in settings.items():
        options = {"method": method, "num_speculative_tokens": nodes, **options}
        said, num_steps, num_tokens = run_engine(texts, options)
        drafter = Alone(DraftSource(draft, grown, len(prompts)), nodes, len(prompts))
        replayed = replay(texts, drafter)
        engine, ours = num_tokens / num_steps, replayed.tokens_per_step
        expected = texts.token_ids[:, PROMPT_LEN : PROMPT_LEN + size.engine_tokens]
        alike = sum(map(list.__eq__, said, expected.tolist()))
        rows.append(
            EngineRow(
                f"{method}, {nodes}",
                f"{alike} of {len(prompts)}",
                num_steps,
                int(replayed.num_steps.sum()),
                f"{engine:.3f}",
                f"{ours:.3f}",
                f"{ours / engine - 1:+.1%}",
            )
        )
        if abs(ours / engine - 1) > TOLERANCE:
            raise SystemExit(f"the replay is not what the engine does: {rows[-1]}")
    return rows


def run_engine(
    texts: Texts, options: dict[str, Any]
) -> tuple[list[list[int]], int, int]:
    """What it said after the prompts, its steps with drafts, and tokens from them."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(MODELS / "target"),
        speculative_config=options,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=len(texts.token_ids),
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        kv_cache_memory_bytes=2**27,
        disable_log_stats=False,
        use_tqdm_on_load=False,
    )
    params = SamplingParams(
        temperature=0.0,
        max_tokens=texts.num_tokens,
        ignore_eos=True,
        detokenize=False,
    )
    prompts = texts.token_ids[:, :PROMPT_LEN].tolist()
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, params, use_tqdm=False)
    metrics = {each.name: each for each in llm.get_metrics()}
    num_steps = int(metrics["vllm:spec_decode_num_drafts"].value)
    num_accepted = int(metrics["vllm:spec_decode_num_accepted_tokens"].value)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    said = [list(output.outputs[0].token_ids) for output in outputs]
    return said, num_steps, num_accepted + num_steps


class CheckRow(NamedTuple):
    check: str
    at_least: float
    found: str
    passed: str


def check(
    name: str, at_least: float, pairs: Sequence[tuple[Outcome, Outcome]]
) -> CheckRow:
    """The least ratio of the pairs, which must reach the bound."""
    ratio, error = min(ours.gain_over(theirs) for ours, theirs in pairs)
    passed = "pass" if ratio >= at_least else "FAIL"
    return CheckRow(name, at_least, f"{ratio:.3f} ± {error:.3f}", passed)


def checks(size: Size, outcomes: Outcomes) -> list[CheckRow]:
    chains = [outcomes["greedy", "chain", length] for length in CHAINS]
    best_chain = max(chains, key=lambda each: each.tokens_per_step)
    rows = []
    for depth, name, baseline, bounds in (
        (4, "the chain of 4", outcomes["greedy", "chain", 4], {16: 1.2, 64: 1.4}),
        (8, "the best chain", best_chain, {16: 1.03, 64: 1.28}),
    ):
        for nodes, bound in bounds.items():
            if ours := outcomes.get(("greedy", "best_first", depth, nodes)):
                title = f"greedy, depth {depth}, best_first of {nodes} over {name}"
                rows.append(check(title, bound, [(ours, baseline)]))
    settings = list(product(TEMPERATURES, size.depths))
    growing = [
        (
            outcomes[text, "best_first", depth, more],
            outcomes[text, "best_first", depth, fewer],
        )
        for text, depth in settings
        for fewer, more in pairwise(size.node_counts)
    ]
    rows.append(check("more nodes over fewer, best_first", 1.0, growing))
    over_static = [
        (
            outcomes[text, "best_first", depth, nodes],
            outcomes[text, "static", depth, nodes],
        )
        for (text, depth), nodes in product(settings, size.node_counts)
    ]
    rows.append(check("best_first over static, same depth and nodes", 1.0, over_static))
    merged = [
        (outcomes[text, "merged", nodes], outcomes[text, "better", nodes])
        for text, nodes in product(TEMPERATURES, size.merged_node_counts)
    ]
    rows.append(check("both drafts merged over the better alone", 0.98, merged))
    return rows


NOTES = f"""\
Tokens per step are accepted draft tokens and the target's own one, over all steps of all
prompts; ± is the standard error, prompts being the sample. All settings replay the same
text: float32 continuations of {PROMPT_LEN}-token prompts from held-out files. Greedy ones
soon repeat themselves, which is what the suffix proposer is good at.

A chain is what vLLM's own draft_model verifies. static is the non-widening branching,
and sequoia the tree, with the most expected tokens under an acceptance measured on
continuations of other places in these files. best_first of K nodes runs the draft on
min(32, max(4, K / 2)) nodes per level and draws min(16, K) children for each, of which
sampled text could use more at 64 nodes. Merged trees are {MERGED_DEPTH} levels of each
draft, calibrated online, first on those other continuations; suffix read them, too.
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="everything, in miniature")
    quick = parser.parse_args().quick
    size = QUICK if quick else Size()
    print_table("Replay against engine, greedy", rows := engine_rows(size))
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        print_table("Replay against engine, greedy", rows)
        passed = replay_all(size)
    print(written.getvalue())
    if not quick:
        write_results(written.getvalue())
        if not passed:
            raise SystemExit("a check failed")


def replay_all(size: Size) -> bool:
    outcomes: Outcomes = {}
    tables: dict[str, list[Any]] = {}
    for text, temperature in TEMPERATURES.items():
        bench = Bench(size, temperature)
        for title, replayed in (
            ("The target's token is among the draft's first", agreement(bench, text)),
            ("Chains", replay_chains(bench, text, outcomes)),
            ("Shapes", replay_shapes(bench, text, outcomes)),
            ("Merged", replay_merged(bench, text, outcomes)),
        ):
            tables.setdefault(title, []).extend(replayed)
    for title, rows in tables.items():
        print_table(title, rows)
    found = checks(size, outcomes)
    print_table("Checks; the least ratio found", found)
    return all(row.passed == "pass" for row in found)


def write_results(tables: str) -> None:
    commit = subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True
    ).strip()
    command = "python benchmarks/bench_draft_trees.py"
    RESULTS.write_text(
        f"# Draft trees\n\n```\n{command}\n```\n\nCommit {commit}. {machine()}.\n\n"
        f"{NOTES}{tables}"
    )


if __name__ == "__main__":
    main()
