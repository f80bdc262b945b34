"""The recipes' config classes, each imported when it is needed, and the recipe that a config is for."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # both take long to import, and `layerskip ls` needs neither
    from omegaconf import DictConfig

    from layerskip_recipes.config.recipe_config import RecipeConfig

RECIPES = {
    "layerskip_finetune": "training.config.FinetuneConfig",
    "layerskip_generate": "generation.config.GenerateConfig",
    "layerskip_eval": "evaluation.config.EvalConfig",
    "layerskip_benchmark": "benchmark.config.BenchmarkConfig",
}
# Keys that no other recipe has; a config without any of them is for layerskip_generate.
OWN_KEYS = {
    "layerskip_finetune": ("optimizer", "loss", "metric_logger"),
    "layerskip_benchmark": ("variants", "report_dir", "temperatures", "random_weights", "tune", "peers"),
    "layerskip_eval": ("dataset", "tasks"),
}


def config_class(recipe: str) -> "type[RecipeConfig]":
    """The class of a recipe's config, such as FinetuneConfig."""
    module, _, name = RECIPES[recipe].rpartition(".")
    return getattr(import_module(f"layerskip_recipes.{module}"), name)


def recipe_of(source: "DictConfig") -> str:
    """The recipe of a merged config: the first one in `OWN_KEYS` of which a key is set, and not to null."""
    given = {key for key, value in source.items_ex(resolve=False) if value is not None}
    return next((recipe for recipe, keys in OWN_KEYS.items() if given.intersection(keys)), "layerskip_generate")


def validate(source: "DictConfig") -> str:
    """Check a merged config without loading weights, and return the recipe that it is for."""
    recipe = recipe_of(source)
    config_class(recipe).load(source)
    return recipe
