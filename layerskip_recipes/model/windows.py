"""Attention windows: masks that hide the tokens before a window, computed once for all layers that have it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn


class Narrowed(NamedTuple):
    """A mask that hides the tokens before the window of the layers that get it."""

    mask: Any


def last_visible(mask: Any, window: int, x: torch.Tensor) -> Any:
    """A mask with which each query sees only the last `window` of the slots that it sees with `mask`.

    `mask`: True or 0 for visible slots [b or 1, s, end], which lie side by side; an object with a method `within`; a
    `Narrowed`; or None, causal attention of x [.., s, d], which stays None if no window hides a token. Other masks are
    a ValueError.
    """
    if isinstance(mask, Narrowed):
        return mask.mask
    if mask is None:
        s = x.shape[-2]
        ones = torch.ones(1, s, s, dtype=torch.bool, device=x.device)
        return ones.tril().triu(1 - window) if s > window else None
    if hasattr(mask, "within"):
        return mask.within(window)
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"mask: a {type(mask).__name__} has no window. Allowed: a tensor [b, s, s], True for visible tokens"
        )
    visible = mask if mask.dtype == torch.bool else mask == 0
    seen = visible & (visible.flip(-1).cumsum(-1).flip(-1) <= window)
    return seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def masks_of_layers(layers: Iterable[nn.Module], mask: Any, x: torch.Tensor) -> list[Any]:
    """The mask of each layer for hidden states x [b, s, d]; layers with the same window share one."""
    windows: list[int | None] = [getattr(layer.attn, "window", None) for layer in layers]
    masks = {window: mask if window is None else Narrowed(last_visible(mask, window, x)) for window in {*windows}}
    return [masks[window] for window in windows]
