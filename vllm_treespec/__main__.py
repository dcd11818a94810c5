"""The command ``vllm-treespec``; ``python -m vllm_treespec`` is the same."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm_treespec.config import METHOD, ConfigError
from vllm_treespec.core.propose.sequoia import expected_tokens, optimal_template
from vllm_treespec.integration.check import check
from vllm_treespec.integration.measure_acceptance import (
    Measured,
    MeasureOptions,
    measure_acceptance,
)

Option = tuple[str, type, str]  # name, type, help
REQUIRED: tuple[Option, ...] = (
    ("draft", str, "the small model, with the target's tokens"),
    ("data", str, "a text, or JSON Lines with a 'prompt' each (.jsonl)"),
    ("out", Path, "the JSON file to write"),
)
OPTIONAL: tuple[Option, ...] = (
    ("temperature", float, "how the target samples, 0: greedy"),
    ("num_prompts", int, "prompts drawn from the data"),
    ("max_tokens", int, "longest continuation of a prompt"),
    ("prompt_tokens", int, "tokens of a prompt cut from a text"),
    ("num_ranks", int, "choices of the draft that are told apart"),
    ("seed", int, "of what is drawn and sampled"),
    ("dtype", str, "as vLLM's, for both models"),
    ("max_model_len", int, "as vLLM's, for both models; else what it takes"),
    ("gpu_memory_utilization", float, "as vLLM's; the models run in turns"),
)
TABLE_NODES = (4, 8, 16, 32, 64, 128)
TABLE_DEPTH = 10
DEFAULTS = {each.name: each.default for each in fields(MeasureOptions)}


def main(arguments: list[str] | None = None) -> int:
    """Do what the arguments say; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-treespec", description="Tree speculative decoding for vLLM."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_check(commands)
    tune = commands.add_parser("tune", help="measure what a proposer needs to know")
    whats = tune.add_subparsers(required=True, metavar="WHAT")
    _add_tune_sequoia(whats)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    try:
        return int(run(**options))
    except ConfigError as error:
        print(f"vllm-treespec: {error}", file=sys.stderr)
        return 1


def _add_check(commands: Any) -> None:
    parser = commands.add_parser("check", help="will it work here, and as what?")
    parser.add_argument(
        "speculative_config",
        nargs="?",
        default=json.dumps({"method": METHOD}),
        help="the JSON given to --speculative-config",
    )
    parser.set_defaults(run=_check)


def _check(speculative_config: str) -> int:
    return 0 if check(speculative_config) else 1


def _add_tune_sequoia(whats: Any) -> None:
    parser = whats.add_parser(
        "sequoia",
        help="how often a draft's k-th choice is the target's",
    )
    parser.add_argument("target", metavar="TARGET", help="the large model")
    for name, kind, text in REQUIRED:
        parser.add_argument(f"--{name}", type=kind, required=True, help=text)
    for name, kind, text in OPTIONAL:
        default = DEFAULTS[name]
        told = "" if default is None else f" (default: {default})"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default, help=text + told)
    parser.set_defaults(run=_tune_sequoia)


def _tune_sequoia(out: Path, **options: Any) -> int:
    if not out.parent.is_dir():
        raise ConfigError(f"out={str(out)!r}: {out.parent} is no directory; make it")
    measured = measure_acceptance(MeasureOptions(**options))
    measured.write(out)
    _print_expected(measured)
    print(f"\nwritten to {out}")
    return 0


def _print_expected(measured: Measured) -> None:
    print(f"\n{measured.num_positions} positions, depth <= {TABLE_DEPTH}\n")
    print("| draft nodes | depth | tokens per step |")
    print("|------------:|------:|----------------:|")
    for num_nodes in TABLE_NODES:
        template = optimal_template(measured.acceptance, num_nodes, TABLE_DEPTH)
        expected = expected_tokens(template, measured.acceptance)
        print(f"| {num_nodes:11} | {template.depth:5} | {expected:15.2f} |")


if __name__ == "__main__":
    sys.exit(main())
