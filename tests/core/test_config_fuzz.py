"""Wrong and right configurations by the hundred: no traceback, nothing accepted that
cannot run, nothing refused that can."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_treespec.config import ConfigError, NgramConfig, SuffixConfig, TreeSpecConfig
from vllm_treespec.core.propose.factory import make_proposers, make_shape
from vllm_treespec.strict_json import read_object

CPU = torch.device("cpu")
# Written apart from the declarations, which are on trial.
NUMBERS = {
    "suffix": {
        "depth": (1, 1024),
        "max_cached_tokens": (1024, 4096),
        "min_log_prob": (-50.0, 0.0),
    },
    "ngram": {"depth": (1, 1024), "min_n": (1, 8), "max_n": (8, 64)},
    "recycle": {"k": (1, 256), "depth": (1, 64)},
    "draft_model": {"depth": (1, 64), "width": (1, 256), "top_k": (1, 256)},
    "layer_skip": {"depth": (1, 64), "width": (1, 256), "top_k": (1, 256)},
}
TREE = {
    "verify": ["auto", "target_only"],
    "draw": ["auto", "mixed", "without_replacement"],
    "draft_logits_gib": [0, 0.5, 1024],
    "adaptive": [True, False],
    "max_rows": [None, 1025, 2**20],
    "draft_timeout_ms": [1, 3_600_000],
    "kernels": ["auto", "triton", "torch"],
    "request_defaults": [{}, {"max_nodes": 0}, {"proposers": []}],
}


def _number(low: float, high: float) -> st.SearchStrategy[Any]:
    if isinstance(low, float):
        return st.floats(low, high)
    return st.integers(int(low), int(high)) | st.sampled_from([low, high])


@st.composite
def proposers(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(NUMBERS)))
    options = {name: _number(*bounds) for name, bounds in NUMBERS[kind].items()}
    found = draw(st.fixed_dictionaries({}, optional=options))
    if kind == "draft_model":
        found["model"] = draw(st.text(min_size=1, max_size=9))
    if kind in ("draft_model", "layer_skip") and draw(st.booleans()):
        rates = st.lists(st.floats(0, 1) | st.just(1), min_size=1, max_size=5)
        found |= {"shape": "sequoia", "acceptance": draw(rates)}
    return {"type": kind, **found}


@st.composite
def right(draw: st.DrawFn) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    for each in draw(st.lists(proposers(), max_size=5)):
        kinds = {other["type"] for other in found}
        if each["type"] == "draft_model" or each["type"] not in kinds:
            found.append(each)
    options = {name: st.sampled_from(values) for name, values in TREE.items()}
    tree = draw(st.fixed_dictionaries({}, optional=options))
    if found:
        tree["proposers"] = found
    nodes = draw(st.integers(1, 1024))
    outer = {"num_speculative_tokens": nodes, "tree": tree}
    dashes = draw(st.booleans())
    return {
        "method": "treespec",
        **{key.replace("_", "-") if dashes else key: outer[key] for key in outer},
    }


many = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@settings(many, max_examples=200)
@given(right())
def test_what_is_right_is_taken_and_travels(raw):
    config = TreeSpecConfig.parse(read_object(json.dumps(raw)))
    assert TreeSpecConfig.parse(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(TreeSpecConfig.parse(config.to_dict()))
    assert config.num_shared_rows > config.num_speculative_tokens >= config.max_depth
    for each in config.device_proposers:
        make_shape(each, config.num_speculative_tokens, device=CPU)


# Not one of them is a value of any option.
WRONG = [
    [[1]],
    {"a": 1},
    "x",
    "",
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    10**5000,
    -(10**30),
    1e300,
    [None],
    [True],
    b"bytes",
    (),
    object(),
]
NAMES = [
    ("num_speculative_tokens",),
    ("tree",),
    ("tree", "proposers"),
    *(("tree", name) for name in TREE),
    ("tree", "request_defaults", "max_nodes"),
    *(
        ("tree", "proposers", place, name)
        for place, kind in enumerate(NUMBERS)
        for name in NUMBERS[kind]
    ),
    ("tree", "proposers", 3, "shape"),
    ("tree", "proposers", 3, "branching"),
    ("tree", "proposers", 3, "acceptance"),
    ("tree", "proposers", 3, "max_model_len"),
    ("tree", "proposers", 4, "early_stop"),
    ("tree", "proposers", 4, "skip"),
    *(("tree", "proposers", place, "type") for place in range(5)),
    ("tree", "proposers", 0),
]
RIGHT: dict[str, Any] = {
    "method": "treespec",
    "tree": {
        "proposers": [{"type": kind} for kind in NUMBERS],
        "request_defaults": {},
    },
}
RIGHT["tree"]["proposers"][3]["model"] = "m"
EMPTY_MEANS_NOTHING = {"branching", "acceptance"}


@pytest.mark.parametrize("path", NAMES, ids=lambda path: ".".join(map(str, path)))
def test_what_is_wrong_is_refused_in_lines_that_name_it(path):
    """500 and more, one wrong value each."""
    TreeSpecConfig.parse(RIGHT)
    for value in WRONG:
        if path[-1] in EMPTY_MEANS_NOTHING and value == ():
            continue
        raw = copy.deepcopy(RIGHT)
        inner: Any = raw
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        with pytest.raises(ConfigError) as error:
            TreeSpecConfig.parse(raw)
        assert str(path[-1]) in str(error.value) or "unknown option" in str(error.value)
        assert len(str(error.value)) < 1000


def test_there_are_enough_of_them():
    assert len(NAMES) * len(WRONG) >= 500


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "tree", "proposers", "model", "skip", "mlp", "-"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(many, max_examples=300)
@given(st.dictionaries(st.sampled_from(["tree", "method", "model", "x"]), TREES))
def test_any_object_is_taken_or_refused_in_words(raw):
    try:
        config = TreeSpecConfig.parse(raw)
    except ConfigError as error:
        assert str(error).startswith("invalid treespec config:\n  ")
    else:
        assert config.proposers


@settings(many, max_examples=300)
@given(st.text(max_size=40) | st.builds(json.dumps, TREES))
def test_any_text_is_read_or_refused_in_words(text):
    try:
        read_object(text)
    except ConfigError as error:
        assert "\n" not in str(error).replace("\\n", "")


@pytest.mark.parametrize("floor", [-1, -0.5, 0])
def test_what_is_accepted_at_the_edge_runs(floor):
    edge = SuffixConfig(min_log_prob=floor, max_cached_tokens=1024, depth=1024)
    longest = NgramConfig(min_n=64, max_n=64, depth=1024)
    config = TreeSpecConfig(num_speculative_tokens=1024, proposers=(edge, longest))
    assert len(make_proposers(config, max_num_reqs=1)) == 2
