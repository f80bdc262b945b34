"""Run the generate recipe in this process."""

from pathlib import Path

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.recipe import LayerSkipGenerate


def run(path: Path, *overrides: str) -> tuple[LayerSkipGenerate, dict]:
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    return recipe, recipe.generate()
