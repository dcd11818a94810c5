"""The search runs in the engine, goes on where it stopped, and its file is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_treespec.config import ConfigError, SkipSet, TreeSpecConfig
from vllm_treespec.integration.tune_layer_skip import (
    TuneOptions,
    tune_layer_skip,
    untuned_sets,
)

TARGET = Path(__file__).parents[2] / "models/python-stdlib/target"


def test_a_study_finds_goes_on_and_is_not_mixed_with_another(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text(Path(__file__).read_text())
    options = TuneOptions(
        model=str(TARGET),
        data=str(data),
        study=str(tmp_path / "study"),
        trials=4,
        num_prompts=2,
        max_tokens=6,
        prompt_tokens=8,
        depth=2,
        width=2,
        num_nodes=3,
        dtype="float32",
        max_model_len=64,
        engine={
            "kv_cache_memory_bytes": 2**24,
            "distributed_executor_backend": "uni",
        },
    )
    first = tune_layer_skip(options)
    assert first.num_trials == 4
    whole = first.compared["0%"]
    assert (whole.ratio, whole.accepted_at) == (1.0, (1.0, 1.0))
    assert 0 < first.compared["50%"].ratio < first.compared["25%"].ratio < 1
    assert first.best.speedup >= max(each.speedup for each in first.compared.values())
    assert tune_layer_skip(replace(options, trials=5)).num_trials == 5
    with pytest.raises(ConfigError, match=r"other values of \['depth'\]"):
        tune_layer_skip(replace(options, depth=1))

    first.write(tmp_path / "skip.json")
    written = json.loads((tmp_path / "skip.json").read_text())
    assert written["expected_speedup"] == first.best.speedup
    proposer = {"type": "layer_skip", "skip": str(tmp_path / "skip.json")}
    config = TreeSpecConfig.parse({"tree": {"proposers": [proposer]}})
    (parsed,) = config.device_proposers
    assert parsed.skip == first.best.skip
    assert parsed.skip.num_layers == 6
    assert len(parsed.skip.fingerprint) == 16


def test_untuned_sets_keep_the_outer_layers():
    found = untuned_sets(12)
    assert found["50%"] == SkipSet(attention=(1, 3, 5, 7, 9), mlp=(1, 3, 5, 7, 9))
    assert found["25%"] == SkipSet(attention=(2, 6, 10), mlp=(2, 6, 10))
    assert found["0%"] == SkipSet()


def test_all_problems_of_a_search_are_told_at_once():
    with pytest.raises(ConfigError, match=r"(?s)trials=0.*depth=99"):
        TuneOptions(model="m", data="d", trials=0, depth=99)
