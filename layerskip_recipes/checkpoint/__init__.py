"""Weights: reading, initialising, quantising, exporting. Imports data and the packages below it."""

from layerskip_recipes.checkpoint.checkpointers import scratch_checkpointer as scratch_checkpointer
