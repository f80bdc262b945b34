"""Groups of layers that share one compiled graph: compiling then takes as long for 32 layers as for a few.

A graph of some layers is compiled once, with the tensors of the first group. Another group of the same structure runs
by the same code with its own tensors, which are found by their names in the layers.
"""

from collections.abc import Hashable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.kv_cache import LayerCache

if TYPE_CHECKING:  # imports inductor, which takes a second
    from layerskip_recipes.generation.kernels.bound_graph import BoundGraph

# A place in a group: which of its layers, and the attributes that lead from this layer to the tensor.
Path = tuple[int, str]


MOST_LAYERS = 8  # of a group: a call costs a small model some hundredths of a step


def layer_groups(first: int, last: int) -> list[tuple[int, int]]:
    """The layers first .. last-1 in groups (first, last), of one size where there is one: each size needs a graph."""
    count = last - first
    size = next((size for size in range(MOST_LAYERS, 3, -1) if count % size == 0), 0)
    if size == 0 and count > 0:
        size = -(-count // -(-count // MOST_LAYERS))
    return [(start, min(start + size, last)) for start in range(first, last, size)] if count else []


def structure_of(model: LayerSkipDecoder, first: int, last: int) -> Hashable:
    """All that a graph of these layers depends on but the values of their tensors."""
    seen: dict[int, int] = {}  # which tensors are the same
    return tuple(_structure(model.layers[layer], seen) for layer in range(first, last))


def _structure(layer: nn.Module, seen: dict[int, int]) -> Hashable:
    parts: list[Hashable] = []
    for name, module in layer.named_modules(remove_duplicate=False):
        plain = tuple((key, _value(value)) for key, value in sorted(vars(module).items()) if key not in _REGISTRIES)
        tensors = tuple(
            (key, type(t), t.dtype, tuple(t.shape), t.stride(), seen.setdefault(id(t), len(seen)))
            for key, t in (*module._parameters.items(), *module._buffers.items())
            if t is not None
        )
        parts.append((name, type(module), plain, tensors))
    return tuple(parts)


# Modules and tensors are looked at one by one; the others are nn.Module's own.
_REGISTRIES = {name for name in vars(nn.Module()) if name != "training"}


def _value(value: Any) -> Hashable:
    """A setting of a module by its value if it is plain, else by its identity; each layer has a cache of its own."""
    if isinstance(value, int | float | str | torch.dtype | torch.device | None):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_value, value))
    return LayerCache if isinstance(value, LayerCache) else id(value)


class SharedGraph:
    """A bound graph of a group of layers without the group's tensors.

    Args:
        bound: the graph of one group.
        first, last: the group.
    """

    def __init__(self, bound: "BoundGraph", model: LayerSkipDecoder, first: int, last: int) -> None:
        paths = {id(tensor): path for path, tensor in _tensors(model, first, last)}
        inputs = bound.own_inputs()
        self.shareable = all(id(tensor) in paths for tensor in inputs.values())
        self.paths = {i: paths[id(tensor)] for i, tensor in inputs.items()} if self.shareable else {}
        self.template = bound.with_inputs(dict.fromkeys(inputs))

    def of(self, model: LayerSkipDecoder, first: int) -> "BoundGraph":
        """The graph for the group that begins with layer `first`."""
        layers = model.layers
        return self.template.with_inputs(
            {i: reduce(getattr, name.split("."), layers[first + place]) for i, (place, name) in self.paths.items()}
        )


def _tensors(model: LayerSkipDecoder, first: int, last: int) -> Iterator[tuple[Path, torch.Tensor]]:
    """The tensors of a group: weights, or the parts of quantised ones, tables and caches."""
    for place in range(last - first):
        layer = model.layers[first + place]
        for name, module in layer.named_modules(remove_duplicate=False):
            prefix = f"{name}." if name else ""
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield from (((place, path), part) for path, part in _parts(prefix + key, tensor))
            cache = vars(module).get("kv_cache")
            if isinstance(cache, LayerCache):
                yield (place, f"{prefix}kv_cache.k"), cache.k
                yield (place, f"{prefix}kv_cache.v"), cache.v


def _parts(path: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield path, tensor
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{path}.{name}", getattr(tensor, name))
