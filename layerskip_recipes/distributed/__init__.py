"""Splitting a decoder over processes, for training and generation: tensor parallelism, and loading from rank 0."""
