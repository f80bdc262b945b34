"""Shared by tests: walk."""

from helpers.tiny import unembedded


def walk(model, tokens, layers, **inputs):
    """g(x) [b, s, v] after the given layers only, written without the decoder's forward."""
    h = model.tok_embeddings(tokens)
    for layer in layers:
        h = model.layers[layer](h, **inputs)
    return unembedded(model, h)
