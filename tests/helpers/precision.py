"""Computing in float64 throughout."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


class KeptPrecision(TorchFunctionMode):
    """Leaves float64 tensors as they are where fp32 is asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func is torch.Tensor.backward:  # in which a mode is off, and checkpointed layers run again
            options = dict(kwargs or {})
            with self:
                return torch.autograd.backward(args[0], options.pop("gradient", None), **options)
        return func(*args, **(kwargs or {}))


@contextmanager
def in_float64() -> Iterator[None]:
    """New parameters are float64, and torchtune's norms, rotations and logits keep that."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with KeptPrecision():
            yield
    finally:
        torch.set_default_dtype(before)
