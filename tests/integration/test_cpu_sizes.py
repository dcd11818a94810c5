"""A CPU's sizes take the place of a GPU's, and never the user's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_treespec.config import ConfigError, TreeSpecConfig
from vllm_treespec.integration.cpu_sizes import (
    WITH_AMX,
    WITHOUT_AMX,
    Sizes,
    parse_for_cpu,
    sizes_for,
)

SMALL = Sizes(num_nodes=7, max_rows=16, min_probability=0.1)


def fitted(tree: dict[str, Any], sizes: Sizes = SMALL, **raw: Any) -> TreeSpecConfig:
    return parse_for_cpu({"method": "treespec", "tree": tree, **raw}, sizes)


@pytest.mark.parametrize(
    ("dtype", "has_amx", "sizes"),
    [
        ("bfloat16", True, WITH_AMX),
        ("auto", True, WITH_AMX),  # vLLM's choice is half precision
        ("float32", True, WITHOUT_AMX),
        (torch.float32, True, WITHOUT_AMX),
        ("bfloat16", False, WITHOUT_AMX),
        (torch.bfloat16, False, WITHOUT_AMX),
    ],
)
def test_trees_are_large_where_rows_are_cheap(
    dtype: Any, has_amx: bool, sizes: Sizes
) -> None:
    assert sizes_for(dtype, has_amx=has_amx) == sizes


def test_what_the_user_leaves_out_is_sized() -> None:
    config = fitted({})
    assert (config.num_speculative_tokens, config.max_rows) == (7, 16)
    assert config.min_probability == 0.1


def test_what_the_user_says_stays() -> None:
    config = fitted({"max_rows": 40}, num_speculative_tokens=20)
    assert (config.num_speculative_tokens, config.max_rows) == (20, 40)
    config = fitted({}, num_speculative_tokens=20)
    assert (config.num_speculative_tokens, config.max_rows) == (20, 21)
    assert fitted({"min_probability": 0}).min_probability == 0


@pytest.mark.parametrize("max_rows", [8, 40])
def test_rows_that_the_user_gave_hold_trees_of_ours(max_rows: int) -> None:
    config = fitted({"max_rows": max_rows})
    assert (config.num_speculative_tokens, config.max_rows) == (7, max_rows)


@pytest.mark.parametrize(
    "tree",
    [
        {"request_defaults": {"max_nodes": 9}},
        {"proposers": [{"type": "layer_skip", "shape": "static", "branching": [3, 3]}]},
    ],
)
def test_options_that_need_more_nodes_get_them(tree: dict[str, Any]) -> None:
    config = fitted(tree)
    assert (config.num_speculative_tokens, config.max_rows) == (31, 32)


def test_an_error_is_about_what_the_user_wrote() -> None:
    with pytest.raises(ConfigError, match="max_rows=5") as error:
        fitted({"max_rows": 5})
    assert "adaptive" not in str(error.value)


def test_everything_else_stays_as_it_was() -> None:
    tree = {"proposers": [{"type": "ngram", "depth": 5}], "adaptive": False}
    before = TreeSpecConfig.parse({"method": "treespec", "tree": tree}).to_dict()
    after = fitted(tree).to_dict()
    for config in (before, after):
        del config["num_speculative_tokens"]
        del config["tree"]["max_rows"], config["tree"]["min_probability"]
    assert before == after
