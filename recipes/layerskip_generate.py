"""`tune run layerskip_generate --config NAME [key=value ...]`; the recipe is layerskip_recipes/generation/recipe.py."""

from layerskip_recipes.cli.recipes import generate

if __name__ == "__main__":
    generate()
