"""The command ``vllm-treespec``; ``python -m vllm_treespec`` is the same."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_treespec.config import METHOD, ConfigError, TreeSpecConfig
from vllm_treespec.core.propose.sequoia import expected_tokens, optimal_template
from vllm_treespec.integration.check import check
from vllm_treespec.integration.measure_acceptance import (
    Measured,
    MeasureOptions,
    measure_acceptance,
)
from vllm_treespec.integration.prompts import RunOptions
from vllm_treespec.integration.tune_layer_skip import TuneOptions, tune_layer_skip

Option = tuple[str, type, str]  # name, type, help
DATA: Option = ("data", str, "a text, or JSON Lines with a 'prompt' each (.jsonl)")
OUT: Option = ("out", Path, "the JSON file to write")
RUN: tuple[Option, ...] = (
    ("num_prompts", int, "prompts drawn from the data"),
    ("max_tokens", int, "longest continuation of a prompt"),
    ("prompt_tokens", int, "tokens of a prompt cut from a text"),
    ("seed", int, "of what is drawn and sampled"),
    ("dtype", str, "as vLLM's, for every model"),
    ("max_model_len", int, "as vLLM's, for every model; else what it takes"),
    ("gpu_memory_utilization", float, "as vLLM's"),
)
SEQUOIA: tuple[Option, ...] = (
    ("temperature", float, "how the target samples, 0: greedy"),
    ("num_ranks", int, "choices of the draft that are told apart"),
    *RUN,
)
LAYER_SKIP: tuple[Option, ...] = (
    ("trials", int, "sets that are tried, earlier runs of the study included"),
    ("depth", int, "longest drafted path in tokens"),
    ("width", int, "nodes per level that the draft runs on"),
    ("num_nodes", int, "draft nodes verified per request and step"),
    ("study", str, "file that remembers the trials; else OUT with .study behind"),
    *RUN,
)
TABLE_NODES = (4, 8, 16, 32, 64, 128)
TABLE_DEPTH = 10


def main(arguments: list[str] | None = None) -> int:
    """Do what the arguments say; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-treespec", description="Tree speculative decoding for vLLM."
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"vllm-treespec {version('vllm-treespec')}",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_check(commands)
    tune = commands.add_parser("tune", help="measure what a proposer needs to know")
    whats = tune.add_subparsers(required=True, metavar="WHAT")
    _add_tune_sequoia(whats)
    _add_tune_layer_skip(whats)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    try:
        return int(run(**options))
    except ConfigError as error:
        print(f"vllm-treespec: {error}", file=sys.stderr)
        return 1


def _add_check(commands: Any) -> None:
    parser = commands.add_parser("check", help="would the engine start, and as what?")
    parser.add_argument(
        "--schema", action="store_true", help="print the options as a JSON schema"
    )
    parser.add_argument(
        "speculative_config",
        nargs="?",
        default=json.dumps({"method": METHOD}),
        help="the JSON given to --speculative-config",
    )
    parser.add_argument(
        "engine",
        nargs=argparse.REMAINDER,
        metavar="MODEL ...",
        help="the target, and more options of vllm serve",
    )
    parser.set_defaults(run=_check)


def _check(speculative_config: str, engine: list[str], schema: bool) -> int:
    if schema:
        print(json.dumps(TreeSpecConfig.json_schema(), indent=2))
    else:
        check(speculative_config, engine)
    return 0


def _add_tune_sequoia(whats: Any) -> None:
    parser = whats.add_parser(
        "sequoia",
        help="how often a draft's k-th choice is the target's",
    )
    parser.add_argument("target", metavar="TARGET", help="the large model")
    draft: Option = ("draft", str, "the small model, with the target's tokens")
    _add_options(parser, MeasureOptions, (draft, DATA, OUT), SEQUOIA)
    parser.set_defaults(run=_tune_sequoia)


def _add_options(
    parser: argparse.ArgumentParser,
    kind: type[RunOptions],
    required: tuple[Option, ...],
    optional: tuple[Option, ...],
) -> None:
    """Flags for the fields of these options."""
    defaults = {each.name: each.default for each in fields(kind)}
    for name, of, text in required:
        parser.add_argument(f"--{name}", type=of, required=True, help=text)
    for name, of, text in optional:
        default = defaults[name]
        told = "" if default is None else f" (default: {default})"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=of, default=default, help=text + told)


def _tune_sequoia(out: Path, **options: Any) -> int:
    _check_out(out)
    measured = measure_acceptance(MeasureOptions(**options))
    measured.write(out)
    _print_expected(measured)
    print(f"\nwritten to {out}")
    return 0


def _add_tune_layer_skip(whats: Any) -> None:
    parser = whats.add_parser(
        "layer-skip", help="which sub-layers the target skips when it drafts for itself"
    )
    parser.add_argument("model", metavar="MODEL", help="the target")
    _add_options(parser, TuneOptions, (DATA, OUT), LAYER_SKIP)
    parser.set_defaults(run=_tune_layer_skip)


def _tune_layer_skip(out: Path, study: str | None, **options: Any) -> int:
    _check_out(out)
    tuned = tune_layer_skip(TuneOptions(study=study or f"{out}.study", **options))
    tuned.write(out)
    print(f"\n{tuned.num_trials} sets tried\n")
    print("| skipped | attention | mlp | cost ratio | depth | tokens/step | speed-up |")
    print("|--------:|----------:|----:|-----------:|------:|------------:|---------:|")
    for name, each in {**tuned.compared, "tuned": tuned.best}.items():
        skipped = f"{len(each.skip.attention):9} | {len(each.skip.mlp):3}"
        gain = f"{each.tokens_per_step:11.2f} | {each.speedup:8.2f}"
        print(
            f"| {name:>7} | {skipped} | {each.ratio:10.2f} | {each.depth:5} | {gain} |"
        )
    print(f"\nwritten to {out}")
    return 0


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise ConfigError(f"out={str(out)!r}: {out.parent} is no directory; make it")


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
