"""Prefill: run texts through the model into the cache, in one pass or, behind cached tokens, chunk by chunk."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.decoder import on_device


def common_start(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share, such as the header of a chat template. C++ reads them only once."""
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in lexicographic order
    return min(common_length(first, last), min(map(len, prompts)) - 1)


def common_length(text: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts share at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def read_texts(
    context: StepContext, texts: Sequence[Sequence[int]], reused: int = 0, rows: Sequence[int] | None = None
) -> torch.Tensor:
    """Run the layers below `context.output_exit` over texts [b][any length], whose first `reused` tokens are cached.

    `rows` are the texts' rows in the cache, None for all. Returns x_E of each text's last token, [b, d].
    """
    rows = range(context.cache.num_rows) if rows is None else rows
    width, device = max(map(len, texts)), context.device
    # Pad on the right: slots behind a row's text are overwritten before any of its queries sees them.
    tokens = on_device([[*text, *[0] * (width - len(text))] for text in texts], device)
    last = on_device([len(text) - 1 for text in texts], device)
    size = context.backend.chunk(width, reused)
    row_indices = torch.arange(len(texts), device=device)
    final: Any = None
    # An adapter reads the previous token's state. The first token has none, and the states of reused tokens are not
    # stored, so the first draft behind them may be worse.
    x = torch.zeros(len(texts), 1, context.model.tok_embeddings.embedding_dim, dtype=context.dtype, device=device)
    for start in range(reused, width, size):
        context.before_chunk()
        end = min(start + size, width)
        slots, at = context.cache.slots[:end], context.cache.slots[None, start:end]
        x = _read_chunk(context, tokens[:, start:end], x[:, -1:], at, slots, rows)
        # Keep the state of each text's last token if it is in this chunk.
        state = x[row_indices, (last - start).clamp(0, end - start - 1)]
        ends_here = ((last >= start) & (last < end))[:, None]
        final = state if final is None else torch.where(ends_here, state, final)
    return final


def _read_chunk(
    context: StepContext,
    tokens: torch.Tensor,
    last_state: torch.Tensor,
    at: torch.Tensor,
    slots: torch.Tensor,
    rows: Sequence[int],
) -> torch.Tensor:
    """Run tokens [b, s] through the model and the draft; last_state [b, 1, d] is x_L of the token before them.

    Returns x_E of the output exit, [b, s, d].
    """
    model, draft_decoder, trained_layers = context.model, context.draft_decoder, context.trained_layers
    prefill = partial(context.backend.run, at=at, slots=slots, rows=rows)
    if not context.has_adapter:
        if trained_layers:
            prefill(draft_decoder, tokens, layers=trained_layers, only_cache=True)
        return prefill(model, tokens, layers=range(context.output_exit))
    x = prefill(model, tokens, layers=range(trained_layers.start))
    final = prefill(model, x, layers=range(trained_layers.start, model.num_layers))
    states = model.norm(torch.cat([last_state, final[:, :-1]], 1))
    prefill(draft_decoder, torch.cat([x, states], -1), layers=trained_layers, only_cache=True)
    return final
