"""Calls of compiled steps that do not look up weights and caches again.

torch.compile looks up each weight and each cache by its name at every call: a tenth of a small model's step. Within
one generation they stay the same, so a step's first call records them, and later calls exchange its arguments.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class LastCall:
    """The last call of a compiled function, its inputs and outputs; kept with the function that torch.compile made."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop the references to weights and caches."""
        self.function: Callable | None = None
        self.inputs: Sequence[Any] = ()
        self.outputs: Sequence[torch.Tensor] = ()

    def bind(self, args: Sequence[Any], length: int | None, result: Any) -> "BoundGraph | None":
        """The graph for more calls like the last one; None if an input or output cannot be traced. Forgets the call.

        Args:
            args: of the step in the last call.
            length: the dynamic length in it, if there is one.
            result: of the step in it.
        """
        function, inputs, outputs = self.function, self.inputs, self.outputs
        self.forget()
        argument = {id(leaf): i for i, leaf in enumerate(tree_leaves(args)) if isinstance(leaf, torch.Tensor)}
        output = {id(tensor): i for i, tensor in enumerate(outputs)}
        lengths = [i for i, value in enumerate(inputs) if not isinstance(value, torch.Tensor)]
        leaves, structure = tree_flatten(result)
        if (
            function is None
            or any(inputs[i] != length for i in lengths)
            or any(id(leaf) not in output and isinstance(leaf, torch.Tensor) for leaf in leaves)
        ):
            return None
        return BoundGraph(
            function,
            list(inputs),
            [(i, argument[id(value)]) for i, value in enumerate(inputs) if id(value) in argument],
            lengths,
            [output.get(id(leaf)) for leaf in leaves],
            structure,
        )


class RecordingBackend:
    """Inductor as a backend of torch.compile that records each call of a compiled function.

    torch keeps backends as long as the process lives, so this one holds no strong reference to what it made.

    Args:
        options: of inductor.
        last: where the last call is recorded.
    """

    def __init__(self, options: dict[str, Any], last: LastCall) -> None:
        self.options, self.last = options, weakref.ref(last)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        function: Any = compile_fx(graph, inputs, config_patches=self.options)
        last = self.last()

        def call(*inputs: Any) -> Sequence[torch.Tensor]:
            outputs = function(*inputs)
            last.function, last.inputs, last.outputs = function, inputs, outputs
            return outputs

        return call


class BoundGraph:
    """A compiled function with its weights and caches in place.

    Args:
        compiled: the function.
        inputs: of its first call.
        moving: pairs (place of an input, place of the step's argument that it is).
        lengths: places of the inputs that are the dynamic length.
        outputs: for each part of the step's result the place in the function's outputs; None for a part that is None.
        structure: of the step's result.
    """

    def __init__(
        self,
        compiled: Callable,
        inputs: list[Any],
        moving: list[tuple[int, int]],
        lengths: list[int],
        outputs: list[int | None],
        structure: Any,
    ) -> None:
        self.compiled, self.inputs, self.moving, self.lengths = compiled, inputs, moving, lengths
        self.outputs, self.structure = outputs, structure
        self._drop_arguments()

    def _drop_arguments(self) -> None:
        """Arguments may be results of another CUDA graph, whose memory is used again in the next round."""
        for i, _ in self.moving:
            self.inputs[i] = None

    def __call__(self, args: Sequence[Any], length: int | None) -> Any:
        """The step's result for other arguments of the same shapes."""
        leaves = tree_leaves(args)
        for i, argument in self.moving:
            self.inputs[i] = leaves[argument]
        for i in self.lengths:
            self.inputs[i] = length
        outputs = self.compiled(*self.inputs)
        self._drop_arguments()
        return tree_unflatten([None if i is None else outputs[i] for i in self.outputs], self.structure)
