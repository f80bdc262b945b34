"""`tune run layerskip_finetune --config NAME [key=value ...]`; the recipe is layerskip_recipes/training/recipe.py."""

from layerskip_recipes.cli.recipes import finetune

if __name__ == "__main__":
    finetune()
