"""`tune run layerskip_serve --config NAME [key=value ...]`; the recipe is layerskip_recipes/serving/recipe.py."""

from layerskip_recipes.cli.recipes import serve

if __name__ == "__main__":
    serve()
