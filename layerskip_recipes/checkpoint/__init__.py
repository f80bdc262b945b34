"""Weights: reading, initialising, quantising, exporting. Imports data and the packages below it."""

from layerskip_recipes.checkpoint.checkpointers import scratch_checkpointer
from layerskip_recipes.checkpoint.weights import load_decoder

__all__ = ["load_decoder", "scratch_checkpointer"]
