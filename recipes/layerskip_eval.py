"""`tune run layerskip_eval --config NAME [key=value ...]`; the recipe is layerskip_recipes/evaluation/recipe.py."""

from layerskip_recipes.cli.recipes import evaluate

if __name__ == "__main__":
    evaluate()
