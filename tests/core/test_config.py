import json
import math

import pytest

from vllm_treespec.config import (
    ConfigError,
    DraftModelConfig,
    NgramConfig,
    RecycleConfig,
    SkipSet,
    SuffixConfig,
    TreeSpecConfig,
)
from vllm_treespec.core.propose.factory import make_proposers


def test_defaults_need_nothing_but_the_method():
    config = TreeSpecConfig.parse({"method": "treespec"})
    assert config.num_speculative_tokens == 31
    assert config.proposers == (SuffixConfig(),)


def test_survives_a_trip_through_json():
    config = TreeSpecConfig(
        num_speculative_tokens=7,
        proposers=(
            NgramConfig(min_n=3),
            SuffixConfig(depth=4),
            RecycleConfig(k=3, depth=2),
            DraftModelConfig(model="small", shape="static", branching=(2, 2)),
            DraftModelConfig(model="tiny", shape="sequoia", acceptance=(0.6, 0.2)),
        ),
        adaptive=False,
    )
    assert TreeSpecConfig.parse(json.loads(json.dumps(config.to_dict()))) == config


def test_accepts_dashes_as_vllm_does():
    config = TreeSpecConfig.parse({"method": "treespec", "num-speculative-tokens": 5})
    assert config.num_speculative_tokens == 5


def test_reports_every_problem_at_once():
    """Each with the path as the user wrote it, though what drafts on the host is put
    last."""
    raw = {
        "method": "eagle",
        "num_speculative_tokens": 0,
        "max_rows": 64,
        "tree": {
            "proposers": [
                {"type": "ngram", "min_n": 9, "max-n": 3},
                {"type": "draft_model", "model": 5, "revision": True},
                {"type": "suffix", "depth": 0, "deph": 1},
                {"type": "layer_skip", "skip": {"attention": [[1]], "layers": []}},
            ],
            "kernels": "cuda",
            "max_row": 3,
            "request-defaults": {"max_nodes": "8", "max_node": 1},
        },
    }
    with pytest.raises(ConfigError) as error:
        TreeSpecConfig.parse(raw)
    first, *problems = str(error.value).split("\n  ")
    assert first == "invalid treespec config:"
    assert sorted(problems) == sorted(
        [
            "method='eagle': must be 'treespec'",
            "num_speculative_tokens=0: must be in [1, 1024]",
            'max_rows: belongs into "tree": {"max_rows": ...}',
            "tree.proposers[0].max-n=3: must be >= min_n=9",
            "tree.proposers[1].model=5: must be a string",
            "tree.proposers[1].revision=True: must be a string",
            "tree.proposers[2].depth=0: must be in [1, 1024]",
            "unknown option 'deph' in tree.proposers[2], did you mean 'depth'?",
            "tree.proposers[3].skip.attention[0]=[1]: must be an integer",
            "unknown option 'layers' in tree.proposers[3].skip, did you mean "
            "'num_layers'?",
            "tree.kernels='cuda': must be one of ['auto', 'triton', 'torch']",
            "unknown option 'max_row' in tree, did you mean 'max_rows'?",
            "tree.request-defaults.max_nodes='8': must be an integer",
            "unknown option 'max_node' in tree.request-defaults, "
            "did you mean 'max_nodes'?",
        ]
    )


def test_what_ties_options_together_is_told_beside_what_is_wrong_alone():
    raw = {
        "num_speculative_tokens": 7,
        "tree": {
            "proposers": [
                {"type": "suffix"},
                {"type": "layer_skip", "shape": "static", "branching": [3, 3]},
            ],
            "max_rows": 7,
            "verify": "none",
        },
    }
    with pytest.raises(ConfigError) as error:
        TreeSpecConfig.parse(raw)
    for problem in (
        "tree.proposers[1].branching=[3, 3]: makes 12 nodes: at most "
        "num_speculative_tokens=7",
        "tree.max_rows=7: must be in [8, 1048576]",
        "tree.verify='none': must be one of",
    ):
        assert problem in str(error.value)


def draft(**options):
    return {"tree": {"proposers": [{"type": "draft_model", **options}]}}


def suffix(**options):
    return {"tree": {"proposers": [{"type": "suffix", **options}]}}


def test_everybodys_first_try_is_answered_with_what_works():
    raw = {"method": "treespec", "model": "my/draft", "num_speculative_tokens": 5}
    with pytest.raises(ConfigError) as error:
        TreeSpecConfig.parse(raw)
    right = str(error.value).split("one of the proposers: ")[1]
    config = TreeSpecConfig.parse(json.loads(right))
    assert config.proposers == (DraftModelConfig(model="my/draft"),)
    assert config.num_speculative_tokens == 5


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (suffix(min_log_prob="x"), "min_log_prob='x': must be a number"),
        (suffix(min_log_prob=math.nan), "min_log_prob=nan: must be a finite number"),
        (suffix(min_log_prob=-math.inf), "min_log_prob=-inf: must be a finite number"),
        (suffix(min_log_prob=0.5), "min_log_prob=0.5: must be in [-"),
        (
            suffix(depth=10**5000),
            "depth=<int too large to print>: must be in [1, 1024]",
        ),
        (suffix(depth=1.0), "depth=1.0: must be an integer"),
        ({"tree": {"draft_logits_gib": math.nan}}, "draft_logits_gib=nan: must be a"),
        (
            {"tree": {"proposers": [{"type": []}]}},
            "proposers[0].type=[]: must be one of",
        ),
        (
            draft(model="s", shape="static", branching=["a"]),
            "branching[0]='a': must be",
        ),
        (draft(model=""), "model='': must not be empty"),
        (
            {
                "tree": {
                    "proposers": [{"type": "layer_skip"}],
                    "verify": "traversal",
                    "draft_logits_gib": 0,
                }
            },
            "tree.draft_logits_gib=0: must be more than 0: verify='traversal' draws",
        ),
        (
            {"num_speculative_tokens": 3, "num-speculative-tokens": 4},
            "num-speculative-tokens in speculative_config: is given twice",
        ),
        (
            {"tree": {"max-rows": 64, "max_rows": 65}},
            "max-rows in tree: is given twice",
        ),
        ({"tree": {"num_speculative_tokens": 4}}, "belongs beside tree, not into it"),
        ({"tree": {1: 2}}, "tree"),
        ({1: 2}, "unknown option 1 in speculative_config"),
    ],
)
def test_what_cannot_run_is_refused(raw, message):
    with pytest.raises(ConfigError) as error:
        TreeSpecConfig.parse(raw)
    assert message in str(error.value)
    assert len(str(error.value)) < 500


def nested(depth: int):
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def test_a_value_as_deep_as_a_well_is_refused_in_one_line():
    for raw in (
        draft(model="s", branching=nested(900)),
        {"tree": nested(900)},
        {"tree": {"proposers": nested(900)}},
        {"well": nested(900)},
    ):
        with pytest.raises(ConfigError) as error:
            TreeSpecConfig.parse(raw)
        assert str(error.value).count("\n") == 1
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"num_speculative_token": 3}, "did you mean 'num_speculative_tokens'"),
        ({"model": "small"}, "unknown option 'model' in speculative_config"),
        ({"tree": {"proposer": []}}, "did you mean 'proposers'"),
        ({"tree": []}, "tree=[]: must be an object"),
        ({"tree": {"proposers": {}}}, "tree.proposers={}: must be a list"),
        ({"tree": {"proposers": []}}, "name at least one of"),
        ({"tree": {"proposers": ["suffix"]}}, "tree.proposers[0]='suffix': must be"),
        ({"tree": {"proposers": [{"type": "ngran"}]}}, "did you mean 'ngram'"),
        (
            {"tree": {"proposers": [{}]}},
            "tree.proposers[0].type is missing: must be one of",
        ),
        (
            {"tree": {"proposers": [{"type": "ngram", "max_m": 3}]}},
            "unknown option 'max_m' in tree.proposers[0], did you mean 'max_n'",
        ),
        (
            {"tree": {"proposers": [{"type": "ngram"}, {"type": "ngram"}]}},
            "tree.proposers[1].type='ngram': is listed twice",
        ),
        (
            {"tree": {"proposers": [{"type": "recycle", "k": 0, "depth": 65}]}},
            "tree.proposers[0].depth=65: must be in [1, 64]",
        ),
        (
            {"tree": {"proposers": [{"type": "recycle"}], "verify": "traversal"}},
            "only draft_model and layer_skip can draw",
        ),
        (draft(), "model is missing"),
        (draft(model="small", shape="fixed"), "shape='fixed': must be one of"),
        (draft(model="small", shape="static"), "branching is missing"),
        (
            draft(model="small", branching=[2]),
            "branching=[2]: belongs to shape='static'",
        ),
        (
            draft(model="small", shape="static", branching=[8, 8]),
            "branching=[8, 8]: makes 72 nodes: at most num_speculative_tokens=31",
        ),
        (draft(model="s", shape="static", branching=3), "branching=3: must be a list"),
        (draft(model="s", shape="static", branching=[0]), "branching[0]=0: must be in"),
        (draft(model="s", shape="sequoia"), "acceptance is missing"),
        (draft(model="s", shape="sequoia", acceptance=[2]), "acceptance[0]=2: must be"),
        (draft(model="s", shape="sequoia", acceptance="no.json"), "tune sequoia"),
        (draft(model="small", width=0), "width=0: must be in [1, 256]"),
        ({"tree": {"adaptive": "yes"}}, "tree.adaptive='yes': must be true or false"),
        ({"num_speculative_tokens": "8"}, "num_speculative_tokens='8': must be an int"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens=True: must be an"),
        ({"tree": {"draw": "best"}}, "tree.draw='best': must be one of ['auto',"),
    ],
)
def test_names_the_value_the_bound_and_the_fix(raw, message):
    with pytest.raises(ConfigError) as error:
        TreeSpecConfig.parse({"method": "treespec", **raw})
    assert message in str(error.value)


def test_children_are_drawn_where_it_pays_or_where_the_user_says_so():
    small, temperatures = (DraftModelConfig(model="small"),), (0.0, 0.1, 0.6, 0.7, 1.0)
    for config, draws in (
        (TreeSpecConfig(proposers=small), [False, False, False, True, True]),
        (
            TreeSpecConfig(proposers=small, draw="mixed"),
            [False, True, True, True, True],
        ),
        (TreeSpecConfig(proposers=small, verify="target_only"), [False] * 5),
        (TreeSpecConfig(), [False] * 5),
    ):
        assert [config.draws_at(t) for t in temperatures] == draws


def test_recycle_stands_behind_models_before_the_host_and_never_draws():
    config = TreeSpecConfig(
        proposers=(SuffixConfig(), RecycleConfig(), DraftModelConfig(model="small"))
    )
    assert config.proposer_names == ["draft_model", "recycle", "suffix"]
    assert config.device_proposers == (DraftModelConfig(model="small"),)
    assert config.hosted_proposers == (SuffixConfig(),)
    alone = TreeSpecConfig(proposers=(RecycleConfig(),))
    assert alone.rule == "target_only" and alone.num_drawn == 0
    assert alone.device_proposers == alone.hosted_proposers == ()
    assert alone.max_depth == RecycleConfig().depth


def test_draft_models_come_first():
    """What one has drawn must keep its order when trees are merged."""
    config = TreeSpecConfig(
        proposers=(SuffixConfig(), DraftModelConfig(model="small"), NgramConfig())
    )
    assert [each.type for each in config.proposers] == [
        "draft_model",
        "suffix",
        "ngram",
    ]


def test_several_draft_models_have_names_of_their_own():
    drafts = tuple(DraftModelConfig(model=name) for name in ("small", "tiny"))
    config = TreeSpecConfig(proposers=(*drafts, SuffixConfig()))
    assert config.proposer_names == ["draft_model", "draft_model_2", "suffix"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("0.5 0.25", "is no JSON: Extra data"),
        ("[0.5, 0.25]", "must be a JSON object"),
        ('{"acceptance": [NaN]}', "NaN is no number"),
        ("{}", "'acceptance'"),
        ('{"acceptance": []}', "acceptance is missing"),
        ('{"acceptance": [0.5, "x"]}', "acceptance[1]='x'"),
        ('{"acceptance": [true]}', "acceptance[0]=True"),
    ],
)
def test_a_file_that_is_no_measurement_is_refused(tmp_path, content, problem):
    path = tmp_path / "acceptance.json"
    path.write_text(content)
    raw = draft(model="small", shape="sequoia", acceptance=str(path))
    with pytest.raises(ConfigError) as error:
        TreeSpecConfig.parse({"method": "treespec", **raw})
    assert problem in str(error.value)


def test_a_measurement_is_read_once_and_travels_along(tmp_path):
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps({"acceptance": [0.5, 0.25, 0], "target": "t"}))
    raw = draft(model="small", shape="sequoia", acceptance=str(path))
    config = TreeSpecConfig.parse({"method": "treespec", **raw})
    path.unlink()
    again = TreeSpecConfig.parse(json.loads(json.dumps(config.to_dict())))
    assert again.device_proposers[0].acceptance == (0.5, 0.25, 0)


SKIP = {"attention": [1, 3], "mlp": [2], "model": "m", "num_layers": 6}


def test_a_tuned_skip_set_is_read_once_and_travels_along(tmp_path):
    path = tmp_path / "skip.json"
    path.write_text(json.dumps({**SKIP, "fingerprint": "ab", "expected_speedup": 1.4}))
    raw = {"tree": {"proposers": [{"type": "layer_skip", "skip": str(path)}]}}
    config = TreeSpecConfig.parse(raw)
    path.unlink()
    again = TreeSpecConfig.parse(json.loads(json.dumps(config.to_dict())))
    assert again == config
    (proposer,) = again.device_proposers
    assert proposer.skip == SkipSet(
        attention=(1, 3), mlp=(2,), model="m", num_layers=6, fingerprint="ab"
    )


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("nowhere.json", "'vllm-treespec tune layer-skip' writes such a file"),
        ([1, 2], 'must be a file, or {"attention": [...], "mlp": [...]}'),
        ({"layers": [1]}, "unknown option 'layers'"),
        ({"attention": 3}, "skip.attention=3: must be a list"),
        ({"attention": [-1]}, "skip.attention[0]=-1: must be in"),
        ({"mlp": [2, 2]}, "skip.mlp=[2, 2]: names a layer twice"),
        ({"mlp": ["x"]}, "skip.mlp[0]='x': must be an integer"),
    ],
)
def test_a_skip_set_that_is_none_is_refused(skip, message):
    raw = {"tree": {"proposers": [{"type": "layer_skip", "skip": skip}]}}
    with pytest.raises(ConfigError) as error:
        TreeSpecConfig.parse(raw)
    assert message in str(error.value)


def both(**tree) -> TreeSpecConfig:
    proposers = [{"type": "suffix"}, {"type": "ngram"}]
    return TreeSpecConfig.parse({"tree": {"proposers": proposers, **tree}})


@pytest.mark.parametrize(
    ("extra_args", "max_nodes", "proposers"),
    [
        (None, 8, ("ngram",)),
        ({"somebody": "else's"}, 8, ("ngram",)),
        ({"treespec_max_nodes": 31}, 31, ("ngram",)),
        ({"treespec_max_nodes": 0}, 0, ("ngram",)),
        ({"treespec_proposers": "suffix"}, 8, ("suffix",)),
        ({"treespec_proposers": ["ngram", "suffix"]}, 8, ("ngram", "suffix")),
        ({"treespec_proposers": []}, 8, ()),
    ],
)
def test_requests_get_what_they_ask_for_else_the_defaults(
    extra_args, max_nodes, proposers
):
    config = both(request_defaults={"max_nodes": 8, "proposers": ["ngram"]})
    assert TreeSpecConfig.parse(config.to_dict()) == config
    options = config.for_request(extra_args)
    assert (options.max_nodes, options.proposers) == (max_nodes, proposers)


def test_without_defaults_requests_get_everything():
    options = both().for_request({})
    assert (options.max_nodes, options.proposers) == (31, ("suffix", "ngram"))


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"treespec_max_nodes": 33}, "treespec_max_nodes=33: must be in [0, 31]"),
        ({"treespec_max_nodes": -1}, "treespec_max_nodes=-1: must be in [0, 31]"),
        ({"treespec_max_nodes": "8"}, "treespec_max_nodes='8': must be an integer"),
        ({"treespec_max_nodes": True}, "treespec_max_nodes=True: must be an integer"),
        (
            {"treespec_proposers": ["sufix"]},
            "'sufix': must be one of ['suffix', 'ngram'], did you mean 'suffix'?",
        ),
        ({"treespec_proposers": 3}, "treespec_proposers=3: must be a list"),
        (
            {"treespec_max_node": 3},
            "unknown option 'treespec_max_node' in extra_args, did you mean "
            "'treespec_max_nodes'?",
        ),
    ],
)
def test_what_a_request_cannot_have_is_refused(extra_args, message):
    with pytest.raises(ConfigError) as error:
        both().for_request(extra_args)
    assert message in str(error.value)


def test_defaults_obey_the_same_bounds():
    with pytest.raises(ConfigError) as error:
        both(request_defaults={"max_nodes": 64, "proposers": ["draft_model"]})
    assert "tree.request_defaults.max_nodes=64: must be in [0, 31]" in str(error.value)
    assert "'draft_model': must be one of ['suffix', 'ngram']" in str(error.value)


@pytest.mark.parametrize(
    ("proposers", "num_nodes", "expected"),
    [
        ([NgramConfig()], 8, 8),
        ([NgramConfig()], 500, 500),
        ([NgramConfig(), RecycleConfig()], 1, 2),
        ([NgramConfig(), RecycleConfig()], 8, 16),
        ([NgramConfig(), RecycleConfig()], 31, 62),
        ([NgramConfig(), RecycleConfig()], 33, 64),
        ([NgramConfig(), RecycleConfig()], 64, 64),
        ([NgramConfig(), RecycleConfig()], 500, 500),
    ],
)
def test_proposers_that_share_a_tree_offer_more_than_it_holds(
    proposers, num_nodes, expected
):
    config = TreeSpecConfig(
        num_speculative_tokens=num_nodes, proposers=tuple(proposers)
    )
    assert config.max_candidates == expected
    assert make_proposers(config, max_num_reqs=1)[0].max_nodes == expected


def test_all_requests_share_at_least_the_rows_of_one_whole_tree():
    assert TreeSpecConfig().num_shared_rows == 256
    assert TreeSpecConfig(num_speculative_tokens=500).num_shared_rows == 501
    assert TreeSpecConfig(max_rows=33).num_shared_rows == 33
    with pytest.raises(ConfigError, match=r"tree.max_rows=31: must be in \[32, "):
        TreeSpecConfig.parse({"tree": {"max_rows": 31}})
