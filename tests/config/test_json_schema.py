"""What is made from a config class: the JSON schema, and the Markdown tables of tools/configuration_reference.py."""

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import BeforeValidator, Field

from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.json_schema import json_schema
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import PositiveInt, Section

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "configuration_reference.py"))


class Draft(Section):
    """How tokens are drafted.

    Not part of the summary.
    """

    length: PositiveInt
    """Tokens of a draft."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """A confidence | below which a draft stops."""


class Tree(Section):
    width: PositiveInt = 1


Parts = Annotated[
    list[Component], BeforeValidator(lambda value: value, json_schema_input_type=Component | list[Component])
]


class ExampleConfig(RecipeConfig):
    """A recipe."""

    REFUSED: ClassVar = {"stream": "it prints figures"}

    draft: Draft | None = None
    """The draft."""
    variants: dict[str, Draft | None] = Field(default_factory=dict)
    """Several drafts by name."""
    others: dict[str, Tree] | None = None
    parts: Parts | None = None
    """One, or several."""
    mode: Literal["fast", "slow"] = "fast"
    stop_tokens: Sequence[int] | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    quantizer: Annotated[Component, Takes()] | None = None


@pytest.fixture(scope="module")
def page() -> str:
    return TOOL["markdown"]({"layerskip_example": ExampleConfig})


@pytest.mark.parametrize(
    "row",
    [
        "| `draft` | a section of keys and values (or null) | `null` | The draft. |",
        "| `draft.length` | an integer of 1 or more | required | Tokens of a draft. |",
        "| `draft.threshold` | a number of 0 to 1 (or null) | `null` | A confidence \\| below which a draft stops. |",
        "The keys `variants.NAME.KEY` are those of [draft](#draft).",
        "| `others.NAME.width` | an integer of 1 or more | `1` |  |",
        "| `parts` | a component, or a list of them (or null) | `null` | One, or several. |",
        "| `mode` | fast, slow | `fast` |  |",
        "| `quantizer` | a component (or null) | `null` |  |",
        "| `stream` | it prints figures |",
    ],
)
def test_a_row_of_the_page(row, page):
    assert row in page.splitlines()


def test_keys_of_all_recipes_stand_once_unless_a_recipe_changes_them(page):
    common, own = page.split("## layerskip_example\n")
    assert page.count("| `device` |") == 1 and "| `device` |" in common
    assert "| `dtype` | fp32, bf16 (or null) | required |" in common and "| `dtype` | fp32, bf16 | `bf16` |" in own


def test_the_summary_of_a_section_is_its_first_paragraph(page):
    assert page.count("How tokens are drafted.") == 1 and "Not part" not in page


@pytest.mark.parametrize(
    ("content", "fits"),
    [
        ({"extends": "quickstart/_model", "draft": {"length": 2}}, True),
        ({"extends": ["a", "b"], "draft": None, "stream": False, "mine": 3}, True),
        ({"draft": {"length": "${mine}"}, "model": {"num_layers": 4}}, True),
        ({"draft": {"length": 0}}, False),
        ({"draft": {"lengths": 2}}, False),
        ({"darft": {"length": 2}}, False),
        ({"mode": "quick"}, False),
    ],
)
def test_the_json_schema_of_a_file(content, fits):
    jsonschema = pytest.importorskip("jsonschema")
    assert jsonschema.Draft202012Validator(json_schema(ExampleConfig)).is_valid(content) is fits
