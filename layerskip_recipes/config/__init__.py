"""From a config's name to a checked config. Imports errors only."""

from layerskip_recipes.config.loading import load_config

__all__ = ["load_config"]
