"""`tune run layerskip_benchmark --config NAME [key=value ...]`; the recipe: layerskip_recipes/recipes/benchmark.py."""

from layerskip_recipes.recipes.benchmark import main

if __name__ == "__main__":
    main()
