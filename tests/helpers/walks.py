"""Shared by tests: tokens, walk."""

import pytest
import torch
from helpers.tiny import VOCAB, unembedded


def walk(model, tokens, layers, **inputs):
    """g(x) [b, s, v] after the given layers only, written without the decoder's forward."""
    h = model.tok_embeddings(tokens)
    for layer in layers:
        h = model.layers[layer](h, **inputs)
    return unembedded(model, h)


@pytest.fixture
def tokens():
    return torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
