"""How a generation notices that a model has changed since the last one: its weights, and the user's code in it.

Numbers that depend on a model, such as the KV cache, are kept between generations while `weights_key` stays the same.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdRef

SAMPLES = 16  # numbers read from each tensor
# Hooks with which torch and this package split a model over processes. They never change what the model computes.
SPLITTING = ("torch.distributed.", "layerskip_recipes.distributed.")


def has_user_code(module: nn.Module) -> bool:
    """Whether a module itself has forward hooks, parametrisations, or a `forward` that replaces its class's."""
    hooks: Any = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    return (
        any(not str(getattr(hook, "__module__", "")).startswith(SPLITTING) for hook in hooks)
        or "parametrizations" in module._modules
        or "forward" in vars(module)
    )


def user_code_in(*models: nn.Module) -> str | None:
    """The name of the first module that `has_user_code`, or "every module" with global hooks; None if there is none."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "every module"
    parts = (part for model in models for part in model.named_modules())
    return next((name or type(module).__name__ for name, module in parts if has_user_code(module)), None)


def weights_key(tensors: Iterable[torch.Tensor]) -> tuple[Any, ...]:
    """Differs from an earlier key of these tensors if one was replaced, moved, cast or written to.

    torch counts writes, except those through `.data`. To notice those, the key has the address and a few numbers of
    each tensor. On a GPU this is one small transfer. A write through `.data` that spares all these numbers goes
    unnoticed.
    """
    marks, samples = [], defaultdict[Any, list[torch.Tensor]](list)
    with torch.no_grad():
        for part in chain.from_iterable(map(plain_tensors, tensors)):
            start, storage = part.storage_offset(), part.untyped_storage()
            version = 0 if part.is_inference() else part._version
            marks.append((WeakIdRef(part), part.data_ptr(), version, part.dtype, part.shape))
            size = min(part.numel(), storage.nbytes() // part.element_size() - start)
            if size > 0 and not part.is_meta:
                count = min(size, SAMPLES)
                spread = part.detach().as_strided((count,), (size // count,), start)
                samples[part.device, part.dtype].append(spread)
        by_device = defaultdict[torch.device, list[torch.Tensor]](list)
        for (device, _), spreads in samples.items():
            by_device[device].append(torch.cat(spreads).view(torch.uint8))
        numbers = [torch.cat(spreads).cpu().numpy().tobytes() for spreads in by_device.values()]
    return (*marks, *numbers)


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor, or the plain tensors in a quantised or sharded one."""
    if is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:
            if isinstance(part, torch.Tensor):  # and not the mesh of a sharded one
                yield from plain_tensors(part)
    else:
        yield tensor
