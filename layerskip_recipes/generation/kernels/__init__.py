"""Compiled decoding steps: C++ on a CPU, graphs on a GPU and for models that the C++ does not support."""
