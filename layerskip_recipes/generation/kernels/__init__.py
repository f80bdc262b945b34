"""Compiled decoding steps, CUDA graphs, and products and attention of few rows on a CPU."""
