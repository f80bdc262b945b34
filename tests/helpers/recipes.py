"""Run the recipe of a config in this process."""

from pathlib import Path
from typing import Any

from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.evaluation.recipe import LayerSkipEval
from layerskip_recipes.generation.recipe import LayerSkipGenerate


def ready(recipe: type, path: Path | str, *overrides: str) -> Any:
    """The recipe of a config, set up."""
    made = recipe(load_config(str(path), overrides))
    made.setup()
    return made


def run_generate(path: Path | str, *overrides: str) -> tuple[LayerSkipGenerate, dict]:
    recipe = ready(LayerSkipGenerate, path, *overrides)
    return recipe, recipe.generate()


def run_eval(path: Path | str, *overrides: str) -> tuple[LayerSkipEval, dict]:
    recipe = ready(LayerSkipEval, path, *overrides)
    return recipe, recipe.evaluate()


def run_benchmark(path: Path | str, *overrides: str) -> tuple[LayerSkipBenchmark, dict]:
    recipe = ready(LayerSkipBenchmark, path, *overrides)
    return recipe, recipe.benchmark()
