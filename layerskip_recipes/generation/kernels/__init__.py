"""Compiled decoding steps: C++ for a CPU, graphs for a GPU and for models with parts that the C++ does not know."""
