"""Find the recipe of a config, and import its config class."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # slow imports that `layerskip ls` does not need
    from omegaconf import DictConfig

    from layerskip_recipes.config.recipe_config import RecipeConfig


class RecipeClasses(NamedTuple):
    """Dotted paths below `layerskip_recipes`, so that `layerskip ls` imports neither class."""

    config: str
    recipe: str | None = None
    """The class whose constructor chooses values for `auto`; None: loading the config chooses all of them."""


RECIPES = {
    "layerskip_finetune": RecipeClasses("training.config.FinetuneConfig"),
    "layerskip_generate": RecipeClasses("generation.config.GenerateConfig", "generation.recipe.LayerSkipGenerate"),
    "layerskip_eval": RecipeClasses("evaluation.config.EvalConfig", "evaluation.recipe.LayerSkipEval"),
    "layerskip_benchmark": RecipeClasses("benchmark.config.BenchmarkConfig", "benchmark.recipe.LayerSkipBenchmark"),
    "layerskip_serve": RecipeClasses("serving.config.ServeConfig", "serving.recipe.LayerSkipServe"),
}
# Keys that only one recipe has. A config without any of them is for layerskip_generate.
OWN_KEYS = {
    "layerskip_finetune": ("optimizer", "loss", "metric_logger"),
    "layerskip_benchmark": ("variants", "report_dir", "temperatures", "random_weights", "tune"),
    "layerskip_eval": ("dataset",),
    "layerskip_serve": ("host", "port", "max_waiting"),
}


def config_class(recipe: str) -> "type[RecipeConfig]":
    return _imported(RECIPES[recipe].config)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"layerskip_recipes.{module}"), name)


def recipe_of(source: "DictConfig") -> str:
    """The first recipe in `OWN_KEYS` that has a non-null key in the merged config."""
    set_keys = {key for key, value in source.items_ex(resolve=False) if value is not None}
    return next((recipe for recipe, keys in OWN_KEYS.items() if set_keys.intersection(keys)), "layerskip_generate")


def resolved(source: "DictConfig") -> "DictConfig":
    """A merged config in which `auto` is replaced as its recipe would, without loading weights."""
    recipe = recipe_of(source)
    recipe_class = RECIPES[recipe].recipe
    if recipe_class is None:
        return config_class(recipe).load(source).source
    return _imported(recipe_class)(source).cfg.source


def validate(source: "DictConfig") -> str:
    """Check a merged config without loading weights, and return its recipe."""
    recipe = recipe_of(source)
    config_class(recipe).load(source)
    return recipe
