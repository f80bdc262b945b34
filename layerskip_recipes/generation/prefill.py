"""Prefill: texts through the model and into the cache, in one pass or, behind tokens that it holds, part by part."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.decoder import LayerSkipDecoder, is_plain_attention, on_device
from layerskip_recipes.model.kv_cache import causal_mask

CHUNK = 512  # positions whose mask is held at a time, when a text goes on from a cache
SHORT = 128  # tokens that C++ reads faster than torch does, and as many as it reads at a time


def reads_in_cpp(context: StepContext, tokens: int) -> bool:
    """Whether C++ is to read a text of so many tokens: a short one, and in bf16 any where torch is slow in it.

    It must not depend on the other rows: in bf16 torch rounds differently, and a row would get other tokens than alone.
    With torch 2.13 on a Zen 3, SmolLM2 135M read 128 tokens in bf16 in 1.7 s, and 2000 in 26 s; C++ in 0.3 and 7 s.
    """
    slow = context.dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return context.has_cpp and (slow or tokens <= SHORT)


def read_texts(
    context: StepContext, texts: Sequence[Sequence[int]], depth: int, reused: int = 0, rows: Sequence[int] | None = None
) -> torch.Tensor:
    """Run the first `depth` layers over texts [b][any number], whose first `reused` tokens are in the cache already.

    `rows` are theirs in the cache, None for all -> x_depth of each text's last token, [b, d].
    """
    rows = range(context.cache.rows) if rows is None else rows
    final: dict[int, torch.Tensor] = {}
    for group, in_cpp in _groups(context, [len(text) - reused for text in texts], depth):
        part, where = [texts[i] for i in group], [rows[i] for i in group]
        alone = nullcontext() if in_cpp or len(where) == context.cache.rows else context.cache.only(*where)
        with alone:
            final |= zip(group, _read_together(context, part, where, depth, reused, in_cpp), strict=True)
    return torch.stack([final[i] for i in range(len(texts))])


def _groups(context: StepContext, lengths: Sequence[int], depth: int) -> list[tuple[list[int], bool]]:
    """Which of the texts are read together, and whether C++ reads them.

    C++ computes each text bit for bit as if it were alone. torch may not, so beside C++ it reads them one by one.
    """
    everything = [*range(len(lengths))]
    short = [i for i in everything if reads_in_cpp(context, lengths[i])]
    if not context.has_cpp or (short and not context.load_cpp(depth)):
        return [(everything, False)]
    context.allocate(depth)
    return [(short, True)] * bool(short) + [([i], False) for i in everything if i not in short]


def _read_together(
    context: StepContext, texts: Sequence[Sequence[int]], rows: Sequence[int], depth: int, reused: int, in_cpp: bool
) -> torch.Tensor:
    width, device = max(map(len, texts)), context.device
    # Padded on the right: slots behind a row's text are overwritten before any of its queries sees them.
    tokens = on_device([[*text, *[0] * (width - len(text))] for text in texts], device)
    last = on_device([len(text) - 1 for text in texts], device)
    at_once = not in_cpp and reused == 0 and all(is_plain_attention(layer) for layer in context.model.layers)
    size = width if at_once else SHORT if in_cpp else CHUNK
    each = torch.arange(len(texts), device=device)
    final: Any = None
    # An adapter reads the state of the token before. At the text's beginning there is none; nor behind reused tokens,
    # whose states are not kept: its first draft may be worse there.
    x = torch.zeros(len(texts), 1, context.model.tok_embeddings.embedding_dim, dtype=context.dtype, device=device)
    for start in range(reused, width, size):
        end = min(start + size, width)
        slots, at = context.cache.slots[:end], context.cache.slots[None, start:end]
        if in_cpp:
            run = partial(context.run, at=at, slots=slots, unembed=False, rows=rows)
        else:
            context.cache.seek(at, end)
            mask = None if at_once else causal_mask(at, slots, context.dtype)
            run = partial(LayerSkipDecoder.__call__, input_pos=at, mask=mask, unembed=False)
        x = _read(context, tokens[:, start:end], x[:, -1:], depth, run)
        here = x[each, (last - start).clamp(0, end - start - 1)]
        ends_here = ((last >= start) & (last < end))[:, None]
        final = here if final is None else torch.where(ends_here, here, final)
    return final


def _read(
    context: StepContext, tokens: torch.Tensor, before: torch.Tensor, depth: int, run: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """x_depth of a part of the texts, tokens [b, s]; the draft's own layers read it too.

    `before` is x_L of the token before these, [b, 1, d]; `run` runs layers of a model over the tokens or their states.
    """
    model, draft, own = context.model, context.draft_model, context.own_layers
    if not context.has_adapter:
        if own:
            run(draft, tokens)
        return run(model, tokens, exit_layer=depth)
    x = run(model, tokens, exit_layer=own.start)
    final = run(model, None, hidden=x, start_layer=own.start)
    states = model.norm(torch.cat([before, final[:, :-1]], 1))
    run(draft, None, hidden=torch.cat([x, states], -1), start_layer=own.start)
    return final
