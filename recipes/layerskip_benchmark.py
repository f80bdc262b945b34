"""`tune run layerskip_benchmark --config NAME [key=value ...]`; the recipe is layerskip_recipes/benchmark/recipe.py."""

from layerskip_recipes.cli.recipes import benchmark

if __name__ == "__main__":
    benchmark()
