"""`tune run layerskip_generate --config NAME [key=value ...]`; the recipe is layerskip_recipes/recipes/generate.py."""

from layerskip_recipes.recipes.generate import main

if __name__ == "__main__":
    main()
