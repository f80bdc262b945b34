"""Reads and checks configs. Of this package it imports only `errors` and `processes`."""

from layerskip_recipes.config.loading import load_config as load_config
