"""Find the recipe of a config, and import its config class."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow imports that `layerskip ls` does not need
    from omegaconf import DictConfig

    from layerskip_recipes.config.recipe_config import RecipeConfig

RECIPES = {
    "layerskip_finetune": "training.config.FinetuneConfig",
    "layerskip_generate": "generation.config.GenerateConfig",
    "layerskip_eval": "evaluation.config.EvalConfig",
    "layerskip_benchmark": "benchmark.config.BenchmarkConfig",
    "layerskip_serve": "serving.config.ServeConfig",
}
# Keys that only one recipe has. A config without any of them is for layerskip_generate.
OWN_KEYS = {
    "layerskip_finetune": ("optimizer", "loss", "metric_logger"),
    "layerskip_benchmark": ("variants", "report_dir", "temperatures", "random_weights", "tune"),
    "layerskip_eval": ("dataset",),
    "layerskip_serve": ("host", "port", "max_waiting"),
}


def config_class(recipe: str) -> "type[RecipeConfig]":
    module, _, name = RECIPES[recipe].rpartition(".")
    return getattr(import_module(f"layerskip_recipes.{module}"), name)


def recipe_of(source: "DictConfig") -> str:
    """The first recipe in `OWN_KEYS` that has a non-null key in the merged config."""
    given = {key for key, value in source.items_ex(resolve=False) if value is not None}
    return next((recipe for recipe, keys in OWN_KEYS.items() if given.intersection(keys)), "layerskip_generate")


def resolved(source: "DictConfig") -> "DictConfig":
    """A merged config in which `auto` is replaced as its recipe would, without loading weights."""
    config = config_class(recipe_of(source))
    if config.__name__ == "FinetuneConfig":
        return config.load(source).source
    # The other recipes choose in their constructors, which read the prompts.
    recipe = import_module(f"{config.__module__.rpartition('.')[0]}.recipe")
    return getattr(recipe, f"LayerSkip{config.__name__.removesuffix('Config')}")(source).cfg.source


def validate(source: "DictConfig") -> str:
    """Check a merged config without loading weights, and return its recipe."""
    recipe = recipe_of(source)
    config_class(recipe).load(source)
    return recipe
