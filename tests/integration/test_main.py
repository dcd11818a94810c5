import json

from vllm_treespec.__main__ import main


def test_prints_versions_seams_and_config(capsys):
    assert main([json.dumps({"method": "treespec", "num_speculative_tokens": 9})]) == 0
    printed = capsys.readouterr().out
    assert "vllm 0.3" in printed
    assert "moved" not in printed
    assert "EngineArgs.create_engine_config" in printed
    assert '"num_speculative_tokens": 9' in printed


def test_a_wrong_config_is_an_error_exit(capsys):
    assert main(['{"tree": {"proposers": []}}']) == 1
    assert "name at least one of" in capsys.readouterr().out
    assert main(["[1]"]) == 1
    assert "must be a JSON object" in capsys.readouterr().out
