"""`tune run layerskip_finetune --config NAME [key=value ...]`; the recipe is layerskip_recipes/recipes/finetune.py."""

from layerskip_recipes.recipes.finetune import main

if __name__ == "__main__":
    main()
