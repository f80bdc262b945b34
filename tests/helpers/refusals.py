"""What a recipe refuses, and how."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.cli.configs import config_class
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.evaluation.recipe import LayerSkipEval
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.training.recipe import LayerSkipFinetune

RECIPES = {
    "finetune": LayerSkipFinetune,
    "generate": LayerSkipGenerate,
    "eval": LayerSkipEval,
    "benchmark": LayerSkipBenchmark,
}
KEYS = {recipe: {*config_class(f"layerskip_{recipe}").model_fields} for recipe in RECIPES}


def unknown_suggestions(message: str, keys: Iterable[str]) -> list[str]:
    """The overrides that an error message suggests, behind what is allowed, and that begin with no key of the config:
    typed as they stand they would be another mistake."""
    suggested = " ".join(re.split(r"Allowed|for example|e\.g\.|; (?=\S+=)", message)[1:])
    return [key for key in re.findall(r"(?<![\w./-])([a-z_][\w.]*)=", suggested) if key.split(".")[0] not in {*keys}]


def refusal(recipe: str, path: Path, *overrides: str) -> str:
    """The message with which a recipe refuses a config, up to the end of its setup; nothing is written."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(ConfigError) as caught:
        RECIPES[recipe](load_config(str(path), overrides)).setup()
    message = " ".join(str(caught.value).split())  # as the command line shows it
    assert sorted(path.parent.iterdir()) == before, "something is written"
    return message


def check(recipe: str, path: Path, overrides: str, key: str, given: str, allowed: str) -> None:
    message = refusal(recipe, path, *overrides.split("; "))
    assert re.match(re.escape(key) + "[.:]", message), message
    said = re.split(r"Allowed|Nearest|for example|e\.g\.|There: ", message)[0]
    assert re.search(rf"(?<![\w-]){re.escape(given)}(?!\w)", said), message
    assert allowed in message
    assert not unknown_suggestions(message, KEYS[recipe]), message
