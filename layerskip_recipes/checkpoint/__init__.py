"""Weights: reading, initialising, quantising, exporting. Imports acceptance, data and the packages below them."""

from layerskip_recipes.checkpoint.checkpointers import scratch_checkpointer as scratch_checkpointer
