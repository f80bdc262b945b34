"""`tune run layerskip_eval --config NAME [key=value ...]`; the recipe is layerskip_recipes/recipes/eval.py."""

from layerskip_recipes.recipes.eval import main

if __name__ == "__main__":
    main()
