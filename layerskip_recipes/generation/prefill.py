"""Prefill: texts through the model and into the cache, in one pass or, behind tokens that it holds, part by part."""

from collections.abc import Sequence
from typing import Any

import torch

from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.decoder import is_plain_attention, on_device
from layerskip_recipes.model.kv_cache import visible

CHUNK = 512  # positions whose mask is held at a time, when a text goes on from a cache


def read_texts(context: StepContext, texts: Sequence[Sequence[int]], depth: int, reused: int = 0) -> torch.Tensor:
    """Run the first `depth` layers over texts; the cache holds their first `reused` tokens already.

    Args:
        context: whose cache has a row for each text.
        texts: token ids, [b][any number].
        depth: 1..L.
        reused: 0 .. length of the shortest text - 1.

    Returns:
        x_depth of each text's last token, [b, d].
    """
    width, device = max(map(len, texts)), context.device
    # Padded on the right: slots behind a row's text are overwritten before any of its queries sees them.
    tokens = on_device([[*text, *[0] * (width - len(text))] for text in texts], device)
    last = on_device([len(text) - 1 for text in texts], device)
    at_once = reused == 0 and all(is_plain_attention(layer) for layer in context.model.layers)
    rows = torch.arange(len(texts), device=device)
    final: Any = None
    # An adapter reads the state of the token before. At the text's beginning there is none; nor behind reused tokens,
    # whose states are not kept: its first draft may be worse there.
    x = torch.zeros(len(texts), 1, context.model.tok_embeddings.embedding_dim, dtype=context.dtype, device=device)
    for start in range(reused, width, width if at_once else CHUNK):
        end = width if at_once else min(start + CHUNK, width)
        at = context.cache.slots[None, start:end]
        context.cache.seek(at, end)
        mask = None if at_once else visible(context.cache.slots[:end], at, context.dtype)
        x = _read(context, tokens[:, start:end], x[:, -1:], depth, input_pos=at, mask=mask)
        here = x[rows, (last - start).clamp(0, end - start - 1)]
        ends_here = ((last >= start) & (last < end))[:, None]
        final = here if final is None else torch.where(ends_here, here, final)
    return final


def _read(context: StepContext, tokens: torch.Tensor, before: torch.Tensor, depth: int, **inputs: Any) -> torch.Tensor:
    """x_depth of a part of the texts; the draft's own layers read it too.

    Args:
        context: as of `read_texts`.
        tokens: [b, s].
        before: x_L of the token before these, [b, 1, d].
        depth: as of `read_texts`.
        **inputs: mask and input_pos.
    """
    model, draft, own = context.model, context.draft_model, context.own_layers
    if not context.has_adapter:
        if own:
            draft(tokens, unembed=False, **inputs)
        return model(tokens, exit_layer=depth, unembed=False, **inputs)
    x = model(tokens, exit_layer=own.start, unembed=False, **inputs)
    final = model(hidden=x, start_layer=own.start, unembed=False, **inputs)
    states = model.norm(torch.cat([before, final[:, :-1]], 1))
    draft(hidden=torch.cat([x, states], -1), start_layer=own.start, unembed=False, **inputs)
    return final
