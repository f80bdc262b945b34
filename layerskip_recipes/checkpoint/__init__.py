"""Weights: reading, initialising, quantising, exporting. Imports data and what lies below."""

from layerskip_recipes.checkpoint.checkpointers import scratch_checkpointer
from layerskip_recipes.checkpoint.weights import load_decoder

__all__ = ["load_decoder", "scratch_checkpointer"]
