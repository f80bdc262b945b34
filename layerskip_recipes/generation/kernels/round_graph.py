"""A whole round as one CUDA graph."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch


class RoundGraph:
    """A function of tensors (or None), captured as one CUDA graph, so that a call launches it once.

    The function never reads a value on the host. The other tensors that it reads must stay at their `addresses`, which
    are noted for the caller. The next call overwrites the outputs.
    """

    def __init__(
        self, function: Callable[..., Sequence[Any]], inputs: Sequence[torch.Tensor | None], addresses: Hashable
    ) -> None:
        self.addresses = addresses
        self.inputs = [None if value is None else value.clone() for value in inputs]
        self.replay, self.outputs = capture(function, self.inputs)

    def __call__(self, *inputs: torch.Tensor | None) -> Sequence[Any]:
        for buffer, value in zip(self.inputs, inputs, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        self.replay()
        return self.outputs


def capture(
    function: Callable[..., Sequence[Any]], inputs: Sequence[torch.Tensor | None]
) -> tuple[Callable[[], None], Sequence[Any]]:
    """Record function(*inputs) without running it. Returns what runs it, and its outputs."""
    graph = torch.cuda.CUDAGraph()
    device = next(value.device for value in inputs if value is not None)
    # Meanwhile other threads, such as a server's, may allocate memory and wait.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function(*inputs)
    return graph.replay, outputs
