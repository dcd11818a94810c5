import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from vllm_treespec import __main__ as command
from vllm_treespec.config import ConfigError, SkipSet, TreeSpecConfig
from vllm_treespec.integration.measure_acceptance import Measured, MeasureOptions
from vllm_treespec.integration.tune_layer_skip import Outcome, Tuned, TuneOptions

main = command.main


@pytest.fixture(autouse=True)
def runner(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


REQUIRED = ["--draft", "small", "--data", "text.txt"]


def test_check_prints_versions_seams_and_config(capsys):
    config = json.dumps({"method": "treespec", "num_speculative_tokens": 9})
    assert main(["check", config]) == 0
    printed = capsys.readouterr().out
    assert "vllm 0.3" in printed
    assert "seams fit" in printed and "would start" in printed
    assert '"num_speculative_tokens": 9' in printed


def test_check_needs_no_config(capsys):
    assert main(["check"]) == 0
    assert '"num_speculative_tokens": 31' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"method": "treespec", "tree": {"proposers": []}}', "name at least one of"),
        ("[1]", "must be a JSON object"),
        ("{bad json", "the configuration is no JSON"),
        ("[" * 100_000, "nested too deep"),
        ('{"num_speculative_tokens": ' + "9" * 5000 + "}", "is no JSON"),
        ('{"method": "eagle"}', "method='eagle': must be 'treespec'"),
        ("{}", "method is missing"),
        ('{"method": "treespec", "method": "treespec"}', "'method' is given twice"),
        (
            '{"method": "treespec", "tree": {"draft_logits_gib": NaN}}',
            "NaN is no number",
        ),
    ],
)
def test_a_wrong_config_is_an_error_exit_before_vllm_is_looked_at(
    config, message, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["check", config]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out
    assert len(printed.err) < 500


def test_wrong_json_is_told_without_importing_vllm_or_torch():
    code = (
        "import sys; from vllm_treespec.__main__ import main; "
        "assert main(['check', '{bad json']) == 1; "
        "assert not {'vllm', 'torch', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_a_broken_vllm_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "vLLM cannot be imported: ModuleNotFoundError" in line


def draft(model):
    proposers = [{"type": "draft_model", "model": str(model)}]
    return json.dumps({"method": "treespec", "tree": {"proposers": proposers}})


MODELS = Path(__file__).parents[2] / "models/python-stdlib"


@pytest.mark.parametrize(
    ("config", "engine"),
    [
        (draft(MODELS / "draft"), []),
        (draft(MODELS / "draft"), [MODELS / "target", "--dtype", "float32"]),
        ('{"method": "treespec", "tree": {"proposers": [{"type": "layer_skip"}]}}', []),
    ],
)
def test_what_would_start_is_said_to(config, engine, capsys):
    assert main(["check", config, *map(str, engine)]) == 0
    printed = capsys.readouterr().out
    assert ("no target was named" in printed) == (not engine)


@pytest.mark.parametrize(
    ("config", "engine", "message"),
    [
        (draft("/no/such/draft"), [], "/no/such/draft"),
        (draft("/no/such/draft"), [MODELS / "target"], "/no/such/draft"),
        (draft(MODELS / "draft"), ["/no/such/target"], "/no/such/target"),
        (
            '{"method": "treespec"}',
            [MODELS / "target", "--pipeline-parallel-size", "2"],
            "pipeline_parallel_size=2: must be 1",
        ),
    ],
)
def test_what_would_not_start_is_said_not_to(config, engine, message, capsys):
    assert main(["check", config, *map(str, engine)]) == 1
    assert message in capsys.readouterr().err


def test_a_runner_that_is_refused_is_found(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert main(["check"]) == 1
    assert "Model Runner V1 was chosen" in capsys.readouterr().err


def test_the_schema_is_printed_and_so_is_the_version(capsys):
    assert main(["check", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == TreeSpecConfig.json_schema()
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"vllm-treespec {version('vllm-treespec')}\n"


@pytest.mark.parametrize("arguments", [[], ["tune"], ["tune", "sequoia", "large"]])
def test_an_unfinished_command_says_what_is_missing(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "required" in capsys.readouterr().err


def test_the_installed_command_is_this_one():
    pyproject = tomllib.loads(
        (Path(__file__).parents[2] / "pyproject.toml").read_text()
    )
    assert pyproject["project"]["scripts"] == {
        "vllm-treespec": "vllm_treespec.__main__:main"
    }


@pytest.fixture
def measured(monkeypatch):
    """Options of the measurements that were asked for; they come out at once."""
    asked = []

    def measure(options):
        asked.append(options)
        return Measured(acceptance=(0.6, 0.2), num_positions=1000, options=options)

    monkeypatch.setattr(command, "measure_acceptance", measure)
    return asked


def test_tune_sequoia_measures_writes_and_shows_what_trees_are_worth(
    measured, tmp_path, capsys
):
    out = tmp_path / "acceptance.json"
    options = [*REQUIRED, "--out", str(out), "--num-ranks", "2", "--temperature", "0.5"]
    assert main(["tune", "sequoia", "large", *options]) == 0
    assert measured == [
        MeasureOptions(
            target="large", draft="small", data="text.txt", num_ranks=2, temperature=0.5
        )
    ]
    written = json.loads(out.read_text())
    assert written["acceptance"] == [0.6, 0.2]
    assert (written["target"], written["draft"]) == ("large", "small")
    assert (written["temperature"], written["num_positions"]) == (0.5, 1000)
    assert written["vllm_treespec"]
    printed = capsys.readouterr().out
    # 1 + .6 + .36 + .216 + .2
    assert "|           4 |     3 |            2.38 |" in printed
    assert "1000 positions" in printed


def test_a_wrong_option_is_an_error_exit_before_anything_is_measured(
    measured, tmp_path, capsys
):
    out = ["--out", str(tmp_path / "acceptance.json")]
    assert main(["tune", "sequoia", "large", *REQUIRED, *out, "--num-ranks", "0"]) == 1
    assert "num_ranks=0: must be >= 1" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "nowhere" / "acceptance.json")]
    assert main(["tune", "sequoia", "large", *REQUIRED, *out]) == 1
    assert "nowhere is no directory; make it" in capsys.readouterr().err
    assert measured == []


def test_all_problems_of_a_measurement_are_told_at_once():
    with pytest.raises(ConfigError, match=r"(?s)max_tokens=0.*temperature=-1"):
        MeasureOptions(target="t", draft="d", data="x", max_tokens=0, temperature=-1)


def test_tune_layer_skip_searches_writes_and_compares(monkeypatch, tmp_path, capsys):
    asked = []

    def outcome(*skipped, speedup):
        skip = SkipSet(attention=skipped, model="large", num_layers=8)
        return Outcome(
            skip=skip, accepted_at=(0.5, 0.25), ratio=0.5, depth=2, speedup=speedup
        )

    def tune(options):
        asked.append(options)
        return Tuned(
            best=outcome(1, 2, speedup=1.25),
            compared={"0%": outcome(speedup=1.0)},
            num_trials=7,
            options=options,
        )

    monkeypatch.setattr(command, "tune_layer_skip", tune)
    out = tmp_path / "skip.json"
    options = ["--data", "text.txt", "--out", str(out), "--trials", "7"]
    assert main(["tune", "layer-skip", "large", *options]) == 0
    expected = TuneOptions(
        model="large", data="text.txt", trials=7, study=f"{out}.study"
    )
    assert asked == [expected]
    written = json.loads(out.read_text())
    assert (written["attention"], written["expected_speedup"]) == ([1, 2], 1.25)
    assert (written["model"], written["num_layers"]) == ("large", 8)
    printed = capsys.readouterr().out
    assert "7 sets tried" in printed
    assert (
        "|   tuned |         2 |   0 |       0.50 |     2 |        1.75 |     1.25 |"
        in printed
    )
