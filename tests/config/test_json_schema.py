"""The JSON schema refuses mistakes. tests/project/test_docs.py checks that it takes all of our configs."""

import pytest

from layerskip_recipes.config.json_schema import json_schema
from layerskip_recipes.training.config import FinetuneConfig


@pytest.mark.parametrize(
    ("content", "fits"),
    [
        ({"extends": ["a", "b"], "draft": None, "early_exit_loss": {"interval": "${mine}"}, "mine": 3}, True),
        ({"batch_size": 0}, False),
        ({"layer_dropout": {"prb": 0.1}}, False),
        ({"layer_dropuot": {"prob": 0.1}}, False),
        ({"early_exit_loss": {"curriculum": "quick"}}, False),
    ],
)
def test_the_json_schema_of_a_file(content, fits):
    jsonschema = pytest.importorskip("jsonschema")
    assert jsonschema.Draft202012Validator(json_schema(FinetuneConfig)).is_valid(content) is fits
