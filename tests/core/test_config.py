import json

import pytest

from vllm_treespec.config import (
    ConfigError,
    NgramConfig,
    SuffixConfig,
    TreeSpecConfig,
)


def test_defaults_need_nothing_but_the_method():
    config = TreeSpecConfig.parse({"method": "treespec"})
    assert config.num_speculative_tokens == 32
    assert config.proposers == (SuffixConfig(),)


def test_survives_a_trip_through_json():
    config = TreeSpecConfig(
        num_speculative_tokens=7,
        proposers=(NgramConfig(min_n=3), SuffixConfig(depth=4)),
    )
    assert TreeSpecConfig.parse(json.loads(json.dumps(config.to_dict()))) == config


def test_accepts_dashes_as_vllm_does():
    config = TreeSpecConfig.parse({"method": "treespec", "num-speculative-tokens": 5})
    assert config.num_speculative_tokens == 5


def test_reports_every_problem_at_once():
    with pytest.raises(ConfigError) as error:
        TreeSpecConfig(
            num_speculative_tokens=0,
            proposers=(NgramConfig(min_n=9, max_n=3), SuffixConfig(depth=0)),
            kernels="cuda",
        )
    for problem in (
        "num_speculative_tokens=0: must be in [1, 1024]",
        "tree.proposers[0].min_n=9: must be <= max_n=3",
        "tree.proposers[1].depth=0: must be in [1, 1024]",
        "tree.kernels='cuda': must be one of",
    ):
        assert problem in str(error.value)


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
        ({"tree": {"proposers": [{}]}}, "tree.proposers[0].type=None: must be one of"),
        (
            {"tree": {"proposers": [{"type": "ngram", "max_m": 3}]}},
            "unknown option 'max_m' in tree.proposers[0], did you mean 'max_n'",
        ),
        (
            {"tree": {"proposers": [{"type": "ngram"}, {"type": "ngram"}]}},
            "'ngram' is listed twice",
        ),
        ({"num_speculative_tokens": "8"}, "num_speculative_tokens='8': must be an int"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens=True: must be an"),
    ],
)
def test_names_the_value_the_bound_and_the_fix(raw, message):
    with pytest.raises(ConfigError) as error:
        TreeSpecConfig.parse({"method": "treespec", **raw})
    assert message in str(error.value)
