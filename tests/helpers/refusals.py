"""What a recipe refuses, and how."""

import re
from pathlib import Path

import pytest
from helpers.configs import unknown_suggestions

from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.evaluation.config import EvalConfig
from layerskip_recipes.evaluation.recipe import LayerSkipEval
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.recipe import LayerSkipFinetune

RECIPES = {
    "finetune": LayerSkipFinetune,
    "generate": LayerSkipGenerate,
    "eval": LayerSkipEval,
    "benchmark": LayerSkipBenchmark,
}
KEYS = {
    "finetune": {*FinetuneConfig.model_fields},
    "generate": {*GenerateConfig.model_fields},
    "eval": {*EvalConfig.model_fields},
    "benchmark": {*BenchmarkConfig.model_fields},
}


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
