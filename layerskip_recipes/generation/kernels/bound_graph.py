"""Calls of compiled steps that do not look up weights and caches again.

torch.compile looks up each weight and each cache by its name at every call: a tenth of a small model's step. Within
one generation they stay the same, so a step's first call records them, and later calls exchange its arguments.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
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
    """Inductor as a backend of torch.compile that records each call of a compiled function: of the innermost one, which
    takes the parts of quantised weights, and around which torch puts what a bound graph does not need.

    torch keeps backends as long as the process lives, so this one holds no strong reference to what it made.

    Args:
        options: of inductor.
        last: where the last call is recorded.
    """

    def __init__(self, options: dict[str, Any], last: LastCall) -> None:
        self.options, self.last = options, weakref.ref(last)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        last = self.last()

        def compile_inner(*args: Any, **kwargs: Any) -> Any:
            compiled: Any = compile_fx_inner(*args, **kwargs)
            call = compiled.current_callable

            def record(inputs: list[Any]) -> Sequence[torch.Tensor]:
                held = [*inputs]  # the callee empties the list
                outputs = call(inputs)
                last.function, last.inputs, last.outputs = call, held, outputs
                return outputs

            compiled.current_callable = record
            return compiled

        # A graph that is read from the cache of whole functions would not be compiled here, and so not be recorded.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            function: Any = compile_fx(graph, inputs, compile_inner, self.options)

        def call(*inputs: Any) -> Sequence[torch.Tensor]:
            outputs = function(*inputs)
            if len(last.outputs) != len(outputs):  # the function does something of its own behind the innermost one
                last.function, last.inputs, last.outputs = lambda inputs: function(*inputs), inputs, outputs
            return outputs

        return call


class BoundGraph:
    """A compiled function with its weights and caches in place.

    Args:
        compiled: the function of a list of inputs.
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
        # Most steps take and give plain tensors, for which pytree would be slow.
        leaves = args if all(arg is None or isinstance(arg, torch.Tensor) for arg in args) else tree_leaves(args)
        for i, argument in self.moving:
            self.inputs[i] = leaves[argument]
        for i in self.lengths:
            self.inputs[i] = length
        outputs = self.compiled([*self.inputs])  # it empties its list
        self._drop_arguments()
        if self.structure.is_leaf():
            return outputs[self.outputs[0]]
        return tree_unflatten([None if i is None else outputs[i] for i in self.outputs], self.structure)
