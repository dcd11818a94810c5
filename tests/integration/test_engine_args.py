"""The flag, from the user's words to a configuration vLLM can carry."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from vllm_treespec.config import ConfigError, NgramConfig, TreeSpecConfig
from vllm_treespec.integration import sizing
from vllm_treespec.integration.engine_args import WORKER, from_vllm_config
from vllm_treespec.integration.plugin import register

TARGET = str(Path(__file__).parents[2] / "models/python-stdlib/target")
TREE = {"method": "treespec", "tree": {"proposers": [{"type": "ngram"}]}}
NUM_NODES = 31 if torch.cuda.is_available() else 7  # in float32


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    register()


def make(speculative_config=None, **options):
    args = EngineArgs(
        model=TARGET,
        speculative_config=speculative_config,
        dtype="float32",
        enforce_eager=True,
        **options,
    )
    return args, args.create_engine_config()


def test_the_method_becomes_a_native_one_and_the_tree_travels_as_json():
    args, config = make(TREE, additional_config={"mine": 1})
    assert config.speculative_config.method == "ngram_gpu"
    assert config.speculative_config.num_speculative_tokens == NUM_NODES
    assert config.parallel_config.worker_cls == WORKER
    assert config.additional_config["mine"] == 1
    assert from_vllm_config(config).proposers == (NgramConfig(),)
    # Several API servers build from the same arguments.
    assert args.speculative_config == TREE
    assert args.worker_cls == "auto"
    assert from_vllm_config(args.create_engine_config()) == from_vllm_config(config)


@pytest.mark.parametrize(
    ("tree", "max_num_seqs", "load"),
    [
        ({"max_rows": 256}, 8, "at any load: max_num_seqs=8"),
        (
            {"max_rows": 64},
            8,
            "share 64 rows of a forward pass (tree.max_rows): 1-2: 31",
        ),
    ],
)
def test_one_line_says_that_trees_are_on(tree, max_num_seqs, load, monkeypatch):
    tree = {"proposers": [{"type": "ngram"}], **tree}
    raw = {"method": "treespec", "num_speculative_tokens": 31, "tree": tree}
    lines = []
    log = lambda text, *values: lines.append(text % values)  # noqa: E731
    monkeypatch.setattr(sizing.logger, "info", log)
    make(raw, max_num_seqs=max_num_seqs)
    (line,) = lines
    assert "trees of 31 draft nodes per request and step, from ngram; " in line
    assert load in line


def test_it_is_parsed_once(monkeypatch):
    _, config = make(TREE)
    kept = from_vllm_config(config)
    monkeypatch.setattr(TreeSpecConfig, "parse", None)
    assert from_vllm_config(config) is kept
    assert from_vllm_config(pickle.loads(pickle.dumps(config))) == kept


def test_vllms_short_flags_work_too():
    _, config = make(spec_method="treespec", spec_tokens=5)
    assert from_vllm_config(config).num_speculative_tokens == 5


def test_other_methods_and_none_are_left_alone():
    _, config = make({"method": "ngram", "num_speculative_tokens": 3})
    assert config.speculative_config.method == "ngram"
    assert config.parallel_config.worker_cls != WORKER
    _, config = make(None)
    assert config.speculative_config is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worker_cls": "my.Worker"}, "worker_cls='my.Worker': treespec brings its"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2: must be 1"),
        (
            {"kv_cache_dtype": "int8_per_token_head"},
            "kv_cache_dtype='int8_per_token_head': use one of auto, float16",
        ),
        (
            {"kv_sharing_fast_prefill": True},
            "kv_sharing_fast_prefill=True: switch it off",
        ),
        ({"spec_model": "small"}, "--spec-model='small': treespec takes its drafts"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(options, message):
    with pytest.raises(ConfigError) as error:
        make(TREE, **options)
    assert message in str(error.value)


def drafting(**options):
    return {"method": "treespec", "tree": {"proposers": [options]}}


@pytest.fixture
def draft(tmp_path):
    """A copy of the draft, to be spoilt."""
    return Path(shutil.copytree(Path(TARGET).with_name("draft"), tmp_path / "draft"))


def test_a_draft_with_other_tokens_of_equal_number_is_refused(draft):
    raw = drafting(type="draft_model", model=str(draft))
    make(raw)
    path = draft / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab, size = tokenizer["model"]["vocab"], len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = {
        token: number if number < 300 else 300 + (number + 1 - 300) % (size - 300)
        for token, number in vocab.items()
    }
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="tokens are not those of the target"):
        make(raw)


def test_a_target_with_another_models_tokenizer_is_refused(draft, tmp_path):
    path = draft / "config.json"
    config = {**json.loads(path.read_text()), "vocab_size": 1024}
    path.write_text(json.dumps(config))
    raw = drafting(type="draft_model", model=str(draft))
    args = EngineArgs(model=str(draft), speculative_config=raw, dtype="float32")
    with pytest.raises(ConfigError, match="has 1024 tokens in its vocabulary, its tok"):
        args.create_engine_config()


def test_a_draft_folder_without_weights_is_refused(draft):
    raw = drafting(type="draft_model", model=str(draft))
    for path in draft.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(
        ConfigError, match=r"the folder has no weights \(\*.safetensors"
    ):
        make(raw)
    make(raw, load_format="dummy")


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ({"attention": [1, 99]}, "skip.attention: layer 99 is skipped, the model has"),
        ({"mlp": [1], "num_layers": 99}, "skip.num_layers=99: the model has"),
    ],
)
def test_a_skip_set_outside_the_model_is_refused(skip, message):
    with pytest.raises(ConfigError, match=message):
        make(drafting(type="layer_skip", skip=skip))


def test_heads_wider_than_the_kernels_are_refused(draft):
    path = draft / "config.json"
    config = {**json.loads(path.read_text()), "head_dim": 512}
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="head_size=512: must be at most 256"):
        make(drafting(type="draft_model", model=str(draft)))
    args = EngineArgs(model=str(draft), speculative_config=TREE, dtype="float32")
    with pytest.raises(ConfigError, match="head_size=512: the tree kernel takes at"):
        args.create_engine_config()


def test_model_runner_v1_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ConfigError, match="Model Runner V1 was chosen"):
        make(TREE)
