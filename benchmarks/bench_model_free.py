"""python benchmarks/bench_model_free.py

Replays texts through proposers that need no model. A step walks the draft tree as far
as it agrees with the text, then the target adds one token of its own. Every contestant
sees the same prompts and the same earlier outputs.

Needs vLLM and arctic-inference's suffix cache (0.1.1) for their columns. The first
workload is greedy output of the bundled model, kept next to the results; --generate
writes it anew with transformers. ``recycle``, alone and with ``suffix``, needs a target's
logits: it is in bench_recycle.py.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vllm_treespec.core.propose import DecodeStep, Proposer
from vllm_treespec.core.propose.ngram import NgramProposer
from vllm_treespec.core.propose.suffix import SuffixProposer
from vllm_treespec.core.propose.suffix_index import BYTES_PER_TOKEN
from vllm_treespec.testing.bench import print_table

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/python-stdlib/target"
MODEL_TEXT = ROOT / "benchmarks/results/model_free_text.npz"
NODE_COUNTS = (8, 16, 32, 64)
MAX_DEPTH = 64

Tokens = npt.NDArray[np.int32]
Workload = Sequence[tuple[Tokens, Tokens]]  # prompt, output
Tree = tuple[Sequence[int], Sequence[int], float]  # tokens, parents, expected accepts


# ------------------------------------------------------------------------ workloads
def stdlib_files(min_bytes: int, max_bytes: int, seed: int) -> list[str]:
    """The running interpreter's standard library, shuffled."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if not skipped.intersection(path.relative_to(root).parts)
        and min_bytes < path.stat().st_size < max_bytes
    ]
    random.Random(seed).shuffle(paths)
    return [path.read_text(errors="ignore") for path in paths]


@cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def encode(text: str) -> Tokens:
    return np.array(tokenizer().encode(text).ids, np.int32)


def generate(num_prompts: int = 40, length: int = 256) -> None:
    """Greedy continuations of stdlib excerpts, by the bundled target model."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL).float().eval()
    rng = random.Random(5)
    prompts = []
    for text in stdlib_files(6000, 1 << 20, seed=5)[:num_prompts]:
        tokens = encode(text)
        start = rng.randrange(max(1, len(tokens) - 3 * length))
        prompts.append(tokens[start : start + length])
    prompt_ids = torch.from_numpy(np.stack(prompts)).long()
    with torch.inference_mode():
        token_ids = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=False,
            min_new_tokens=length,
            max_new_tokens=length,
        )
    np.savez_compressed(
        MODEL_TEXT,
        prompts=np.stack(prompts).astype(np.int16),
        outputs=token_ids[:, length:].numpy().astype(np.int16),
    )


def model_output() -> Workload:
    saved = np.load(MODEL_TEXT)
    prompts, outputs = saved["prompts"], saved["outputs"]
    return list(zip(prompts.astype(np.int32), outputs.astype(np.int32), strict=True))


def edited_files(num_files: int = 16, max_output: int = 1000) -> Workload:
    """The prompt is a file, the output the file with one line in 30 edited."""
    rng = random.Random(0)
    texts = stdlib_files(3000, 12000, seed=0)[:num_files]
    return [(encode(text), encode(edit(text, rng))[:max_output]) for text in texts]


def edit(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    edited = []
    for line in lines:
        names = [word for word in line.split() if word.isidentifier()]
        change = rng.randrange(3) if rng.random() < 1 / 30 else None
        if change == 0:  # delete
            continue
        if change == 1:  # insert
            edited.append(rng.choice(lines))
        if change == 2 and names:  # rename
            line = line.replace(rng.choice(names), f"renamed_{rng.randrange(9)}")
        edited.append(line)
    return "".join(edited)


def boilerplate(num_requests: int = 60) -> Workload:
    """Classes of one house style: names differ, the frame is shared."""
    rng = random.Random(2)
    nouns = ("Disk", "User", "File", "Task", "Node", "Page", "Item", "Rule")
    names = ("name", "path", "size", "mode", "owner", "stamp", "count", "limit")
    workload = []
    for _ in range(num_requests):
        title = rng.choice(nouns) + rng.choice(nouns)
        fields = rng.sample(names, 5)
        types = [rng.choice(("int", "str", "float")) for _ in fields]
        prompt = (
            "Write Python in our style: a frozen dataclass with from_json, to_json "
            f"and __repr__.\n# The class {title} has the fields {', '.join(fields)}.\n"
        )
        workload.append((encode(prompt), encode(styled_class(title, fields, types))))
    return workload


def styled_class(title: str, fields: Sequence[str], types: Sequence[str]) -> str:
    pairs = zip(fields, types, strict=True)
    declared = "".join(f"    {field}: {kind}\n" for field, kind in pairs)
    read = "".join(f'            {field}=fields["{field}"],\n' for field in fields)
    written = "".join(f'            "{field}": self.{field},\n' for field in fields)
    shown = ", ".join(f"{{self.{field}}}" for field in fields)
    return (
        "from __future__ import annotations\n\nimport json\n"
        "from dataclasses import dataclass\n\n\n"
        f"@dataclass(frozen=True)\nclass {title}:\n{declared}\n"
        f"    @classmethod\n    def from_json(cls, text: str) -> {title}:\n"
        f"        fields = json.loads(text)\n        return cls(\n{read}        )\n\n"
        "    def to_json(self) -> str:\n"
        f"        return json.dumps({{\n{written}        }})\n\n"
        f'    def __repr__(self) -> str:\n        return f"{title}({shown})"\n'
    )


def random_tokens(num_requests: int = 8) -> Workload:
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 50_000, (num_requests, 1000)).astype(np.int32)
    return [(text[:800], text[800:]) for text in texts]


# ---------------------------------------------------------------------- contestants
class Contestant(Protocol):
    """One request at a time; ``history`` already holds the output to be replayed."""

    def start(self, history: Tokens, num_tokens: int) -> None: ...
    def draft(self, num_tokens: int) -> Tree: ...
    def commit(self, num_tokens: int) -> None: ...


class Ours:
    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer

    def start(self, history: Tokens, num_tokens: int) -> None:
        self.history = history[None]
        self.proposer.add_request(0)
        self.commit(num_tokens)

    def step(self, num_tokens: int) -> DecodeStep:
        return DecodeStep(
            np.zeros(1, np.int32), self.history, np.array([num_tokens], np.int64)
        )

    def draft(self, num_tokens: int) -> Tree:
        candidates = self.proposer.propose(self.step(num_tokens))
        size = candidates.num_candidates[0]
        parents = candidates.parents[0, :size].tolist()
        expected = float(np.exp(candidates.scores[0, :size]).sum())
        return candidates.token_ids[0, :size].tolist(), parents, expected

    def commit(self, num_tokens: int) -> None:
        self.proposer.learn(self.step(num_tokens))


class Arctic:
    def __init__(
        self,
        num_nodes: int,
        *,
        tree: bool,
        min_token_prob: float = 0.1,
        max_spec_factor: float = 1.0,
        share_prompts: bool = False,
    ) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache = SuffixDecodingCache(MAX_DEPTH, -1)
        self.request = 0
        self.share_prompts = share_prompts
        self.options = {
            "max_spec_tokens": num_nodes,
            "max_spec_factor": max_spec_factor,
            "min_token_prob": min_token_prob,
            "use_tree_spec": tree,
        }

    def start(self, history: Tokens, num_tokens: int) -> None:
        if self.request:
            self.cache.stop_request(self.request)
        if self.share_prompts:  # or only outputs reach the other requests
            self.cache.start_request(-1 - self.request, history[:0])
            self.cache.add_active_response(-1 - self.request, history[:num_tokens])
            self.cache.stop_request(-1 - self.request)
        self.request += 1
        self.history, self.num_tokens = history, num_tokens
        self.cache.start_request(self.request, history[:num_tokens])

    def draft(self, num_tokens: int) -> Tree:
        context = self.history[max(0, num_tokens - MAX_DEPTH) : num_tokens]
        draft = self.cache.speculate(self.request, context, **self.options)
        return draft.token_ids, draft.parents, draft.score

    def commit(self, num_tokens: int) -> None:
        added = self.history[self.num_tokens : num_tokens]
        self.cache.add_active_response(self.request, added)
        self.num_tokens = num_tokens


class VllmNgram:
    def __init__(self, num_nodes: int, min_n: int, max_n: int) -> None:
        from vllm.v1.spec_decode import ngram_proposer

        self.find = ngram_proposer._find_longest_matched_ngram_and_propose_tokens
        self.limits = (min_n, max_n, 1 << 20, num_nodes)

    def start(self, history: Tokens, num_tokens: int) -> None:
        self.history = history

    def draft(self, num_tokens: int) -> Tree:
        tokens = self.find(self.history[:num_tokens], *self.limits).tolist()
        return tokens, range(-1, len(tokens) - 1), float(len(tokens))

    def commit(self, num_tokens: int) -> None:
        pass


# --------------------------------------------------------------------------- replay
class Replay(NamedTuple):
    accepted: float  # draft tokens per step
    expected: float  # what the drafts' log-probs promised
    draft_us: float  # median, Python included


def replay(contestant: Contestant, workload: Workload) -> Replay:
    accepted: list[int] = []
    expected: list[float] = []
    draft_ns: list[int] = []
    for prompt, output in workload:
        history = np.concatenate([prompt, output])
        contestant.start(history, len(prompt))
        num_tokens = len(prompt) + 1  # prefill sampled one token
        contestant.commit(num_tokens)
        while num_tokens < len(history):
            begin = time.thread_time_ns()
            tokens, parents, promise = contestant.draft(num_tokens)
            draft_ns.append(time.thread_time_ns() - begin)
            accepted.append(walk(tokens, parents, history[num_tokens:].tolist()))
            expected.append(promise)
            num_tokens = min(len(history), num_tokens + accepted[-1] + 1)
            contestant.commit(num_tokens)
    return Replay(
        float(np.mean(accepted)),
        float(np.mean(expected)),
        float(np.median(draft_ns)) / 1e3,
    )


def walk(tokens: Sequence[int], parents: Sequence[int], truth: list[int]) -> int:
    """How many tokens of ``truth`` a path from the root spells."""
    children = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))
    }
    assert len(children) == len(tokens), "two siblings alike"
    node = -1
    for depth, token in enumerate(truth):
        if (node, token) not in children:
            return depth
        node = children[node, token]
    return len(truth)


def suffix(num_nodes: int) -> Ours:
    return Ours(
        SuffixProposer(
            max_num_reqs=1,
            max_nodes=num_nodes,
            max_depth=MAX_DEPTH,
            max_learned_tokens=1 << 20,
        )
    )


def ngram(num_nodes: int) -> Ours:
    return Ours(NgramProposer(max_nodes=num_nodes, max_depth=MAX_DEPTH))


def arctic_trees(num_nodes: int) -> Iterable[Contestant]:
    for prob, factor, share in product(
        (0.001, 0.01, 0.03, 0.1, 0.3), (1, 2, 4, 16), (False, True)
    ):
        yield Arctic(
            num_nodes,
            tree=True,
            min_token_prob=prob,
            max_spec_factor=factor,
            share_prompts=share,
        )


def vllm_ngrams(num_nodes: int) -> Iterable[Contestant]:
    for min_n, max_n in ((1, 5), (2, 5), (5, 5)):
        yield VllmNgram(num_nodes, min_n, max_n)


CONTESTANTS: dict[str, Callable[[int], Iterable[Contestant]]] = {
    "suffix": lambda num_nodes: [suffix(num_nodes)],
    "ngram": lambda num_nodes: [ngram(num_nodes)],
    "arctic_tree": arctic_trees,
    "arctic_chain": lambda num_nodes: [Arctic(num_nodes, tree=False)],
    "vllm_ngram": vllm_ngrams,
}


class AcceptedRow(NamedTuple):
    workload: str
    nodes: int
    suffix: float
    ngram: float
    arctic_tree: float
    arctic_chain: float
    vllm_ngram: float
    suffix_vs_arctic_tree: float


class PromiseRow(NamedTuple):
    workload: str
    nodes: int
    suffix_expected: float
    suffix_accepted: float
    ngram_expected: float
    ngram_accepted: float


class DraftRow(NamedTuple):
    workload: str
    nodes: int
    suffix_us: float
    ngram_us: float
    arctic_tree_us: float
    arctic_chain_us: float
    vllm_ngram_us: float


def compare(workloads: dict[str, Workload]) -> None:
    accepted, promised, drafted = [], [], []
    for (name, workload), nodes in product(workloads.items(), NODE_COUNTS):
        best = {
            contestant: max(replay(each, workload) for each in make(nodes))
            for contestant, make in CONTESTANTS.items()
        }
        ours, ngrams, arctic = best["suffix"], best["ngram"], best["arctic_tree"]
        means = [result.accepted for result in best.values()]
        ratio = ours.accepted / arctic.accepted if arctic.accepted else 1.0
        accepted.append(AcceptedRow._make((name, nodes, *means, ratio)))
        promised.append(
            PromiseRow(
                name,
                nodes,
                ours.expected,
                ours.accepted,
                ngrams.expected,
                ngrams.accepted,
            )
        )
        medians = [result.draft_us for result in best.values()]
        drafted.append(DraftRow._make((name, nodes, *medians)))
    print_table("Accepted draft tokens per step", accepted)
    print_table("Promised (sum of path probabilities) and accepted", promised)
    print_table("CPU us per tree, one request per call, Python included", drafted)
    print("\nrecycle, and recycle with suffix: python benchmarks/bench_recycle.py")


# ----------------------------------------------------------------------- large cache
class SpeedRow(NamedTuple):
    text: str
    nodes_drafted: float
    tree_us: float
    tree_us_p99: float
    learn_us_per_token: float
    bytes_per_token: int


class NgramSpeedRow(NamedTuple):
    text: str
    history_tokens: int
    tree_us: float
    tree_us_p99: float


class ArcticSpeedRow(NamedTuple):
    text: str
    tree_us: float
    tree_us_p99: float
    learn_us_per_token: float
    bytes_per_token: float


def long_texts(num_tokens: int = 1 << 20) -> dict[str, Tokens]:
    rng = np.random.default_rng(0)
    files = [encode(text) for text in stdlib_files(0, 1 << 20, seed=3)]
    source = np.concatenate(files)[:num_tokens]
    return {
        "stdlib": source,
        "one file 100 times": np.resize(source[: num_tokens // 100], num_tokens),
        "one token": np.full(num_tokens, 7, np.int32),
        "random of 50000": rng.integers(0, 50_000, num_tokens).astype(np.int32),
        "random of 100": rng.integers(0, 100, num_tokens).astype(np.int32),
    }


def speed(text: str, tokens: Tokens, num_nodes: int = 32) -> SpeedRow:
    """64 requests share the text; 16 of them draft in one call."""
    num_reqs, batch, num_steps = 64, 16, 128
    length = len(tokens) // num_reqs
    histories = tokens[: num_reqs * length].reshape(num_reqs, length)
    slots = np.arange(num_reqs, dtype=np.int32)
    num_tokens = np.full(num_reqs, length - num_steps, np.int64)
    proposer = SuffixProposer(
        max_num_reqs=num_reqs, max_nodes=num_nodes, max_learned_tokens=1 << 30
    )
    for slot in range(num_reqs):
        proposer.add_request(slot)
    begin = time.thread_time_ns()
    proposer.learn(DecodeStep(slots, histories, num_tokens))
    learn_us = (time.thread_time_ns() - begin) / 1e3 / num_tokens.sum()
    tree_us, drafted = [], []
    for _ in range(num_steps):
        for first in range(0, num_reqs, batch):
            step = DecodeStep(slots[first : first + batch], histories, num_tokens)
            begin = time.thread_time_ns()
            candidates = proposer.propose(step)
            tree_us.append((time.thread_time_ns() - begin) / 1e3 / batch)
            drafted.append(candidates.num_candidates.mean())
        num_tokens += 1
        proposer.learn(DecodeStep(slots, histories, num_tokens))
    return SpeedRow(
        text,
        float(np.mean(drafted)),
        float(np.median(tree_us)),
        float(np.percentile(tree_us, 99)),
        float(learn_us),
        BYTES_PER_TOKEN,
    )


def ngram_speed(text: str, tokens: Tokens, num_nodes: int = 32) -> NgramSpeedRow:
    contestant = ngram(num_nodes)
    contestant.start(tokens, len(tokens))
    tree_us = []
    for num_tokens in range(len(tokens) - 200, len(tokens)):
        begin = time.thread_time_ns()
        contestant.draft(num_tokens)
        tree_us.append((time.thread_time_ns() - begin) / 1e3)
    median, p99 = np.percentile(tree_us, (50, 99))
    return NgramSpeedRow(text, len(tokens), float(median), float(p99))


def arctic_speed(text: str, tokens: Tokens, num_nodes: int = 32) -> ArcticSpeedRow:
    """The same text as earlier outputs, and one request after the other."""
    arctic = Arctic(num_nodes, tree=True, min_token_prob=0.01, max_spec_factor=16)
    length = len(tokens) // 64
    begin = time.thread_time_ns()
    for request in range(64):
        history = tokens[request * length : (request + 1) * length]
        arctic.start(history, 0)
        arctic.commit(length - 128)
    learn_us = (time.thread_time_ns() - begin) / 1e3 / (64 * (length - 128))
    num_bytes = arctic.cache._global_tree.estimate_memory()
    tree_us = []
    for num_tokens in range(length - 128, length):
        begin = time.thread_time_ns()
        arctic.draft(num_tokens)
        tree_us.append((time.thread_time_ns() - begin) / 1e3)
        arctic.commit(num_tokens + 1)
    return ArcticSpeedRow(
        text,
        float(np.median(tree_us)),
        float(np.percentile(tree_us, 99)),
        float(learn_us),
        num_bytes / (64 * length),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--generate", action="store_true")
    if parser.parse_args().generate:
        generate()
    compare(
        {
            "model output": model_output(),
            "edited files": edited_files(),
            "boilerplate": boilerplate(),
            "random": random_tokens(),
        }
    )
    texts = long_texts()
    print_table(
        "suffix: 32 nodes, 1M cached tokens, 16 requests per call, CPU us per tree",
        [speed(text, tokens) for text, tokens in texts.items()],
    )
    print_table(
        "ngram: 32 nodes, one request per call, CPU us",
        [ngram_speed(text, tokens[:100_000]) for text, tokens in texts.items()],
    )
    print_table(
        "arctic tree: 32 nodes, 1M cached tokens, one request per call, CPU us",
        [arctic_speed(text, tokens) for text, tokens in texts.items()],
    )


if __name__ == "__main__":
    main()
