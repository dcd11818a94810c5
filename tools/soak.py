"""make soak: a server with trees under every kind of request, each answer checked.

    python tools/soak.py [--seconds 600] [--requests 108] [--concurrency 7] [--seed 0]

Starts two servers with the bundled model on this machine, one without speculation for
the expected answers and one with trees, and prints Markdown; their logs are in
build/soak. Exits with 1 if an answer was wrong or lost, if something stayed behind, or
if what should have been tried was not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from vllm_treespec.testing.servers import Scrape, launched, serving
from vllm_treespec.testing.soak import Soak, references, warm_up
from vllm_treespec.testing.soak_report import print_report, problems, wait_until_idle
from vllm_treespec.testing.soak_requests import make_requests

ROOT = Path(__file__).parents[1]
MODELS, LOGS = ROOT / "models/python-stdlib", ROOT / "build/soak"
CACHED_TOKENS = 1024
TREE = {
    "method": "treespec",
    "num_speculative_tokens": 6,
    "tree": {
        "proposers": [
            {
                "type": "draft_model",
                "model": str(MODELS / "draft"),
                "depth": 3,
                "width": 2,
            },
            {"type": "suffix", "max_cached_tokens": CACHED_TOKENS},
            {"type": "ngram"},
        ]
    },
}
# As on a GPU, tokens are scheduled ahead of time. Four requests do not fit into 9 blocks.
MAX_NUM_ROWS = 128
CRAMPED = (
    *("--async-scheduling", "--additional-config", '{"treespec_cpu_host_async": true}'),
    *("--block-size", "32", "--num-gpu-blocks-override", "10"),
    *("--max-num-seqs", "4", "--max-num-batched-tokens", str(MAX_NUM_ROWS)),
)


def main() -> int:
    options = _parse()
    requests = make_requests(options.requests, options.seed)
    target = MODELS / "target"
    LOGS.mkdir(parents=True, exist_ok=True)
    with launched(target, TREE, LOGS / "trees.log", *CRAMPED) as server:
        with serving(target, None, LOGS / "plain.log") as plain:
            answers = asyncio.run(references(plain, requests))
        server.wait_until_ready()
        asyncio.run(warm_up(server, MAX_NUM_ROWS))
        soak = Soak(server, requests, answers, options.seed)
        record = asyncio.run(
            soak.run(options.seconds, 2 * CACHED_TOKENS, options.concurrency)
        )
        server.wait_until_ready()  # shows the log of one that did not survive
        left_behind = wait_until_idle(server)
        metrics = Scrape(server)
    print_report(record, metrics, CACHED_TOKENS)
    found = [*problems(record, metrics, CACHED_TOKENS), *filter(None, [left_behind])]
    print("\n" + "\n".join(found or ["Nothing was wrong."]))
    return 1 if found else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a soak of a server with trees")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--requests", type=int, default=108, help="different ones")
    parser.add_argument("--concurrency", type=int, default=7, help="clients at a time")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
