"""What documentation says of options is what their declarations say."""

import json
import runpy
from pathlib import Path

import jsonschema
import pytest

from vllm_treespec.config import PROPOSERS, TreeSpecConfig

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools/option_tables.py"))


@pytest.mark.parametrize("page", TOOL["PAGES"], ids=lambda page: page.name)
def test_tables_are_those_of_the_declarations(page: Path):
    text = page.read_text()
    assert text == TOOL["with_tables"](text), "run python tools/option_tables.py"


def test_every_option_stands_in_a_table():
    pages = "".join(page.read_text() for page in TOOL["PAGES"])
    for name in ("tree", *PROPOSERS):
        assert f"<!-- options: {name} -->" in pages


def test_the_schema_takes_what_is_right_and_refuses_what_is_wrong():
    schema = TreeSpecConfig.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    right = TreeSpecConfig().to_dict()
    jsonschema.validate(json.loads(json.dumps(right)), schema)
    for wrong in (
        {},
        {"method": "eagle"},
        {**right, "model": "m"},
        {**right, "num_speculative_tokens": 0},
        {"method": "treespec", "tree": {"proposers": [{"type": "ngran"}]}},
        {"method": "treespec", "tree": {"proposers": [{"type": "draft_model"}]}},
        {"method": "treespec", "tree": {"kernels": "cuda"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_every_option_says_what_it_is():
    for kind in (*PROPOSERS.values(), TreeSpecConfig):
        for name, option in kind.model_fields.items():
            assert option.description or name == "type", f"{kind.__name__}.{name}"
