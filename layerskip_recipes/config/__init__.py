"""Reading and checking configs. Imports only `layerskip_recipes.errors`."""

from layerskip_recipes.config.loading import load_config

__all__ = ["load_config"]
