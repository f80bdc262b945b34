"""Calls of compiled steps without the walk to their inputs.

torch.compile looks up each weight and each cache by its name at every call: a tenth of a small model's step. In one
generation they stay the same, so after its first call a step gets those of that call, and only the arguments change.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class LastCall:
    """The last call of a compiled function, its inputs and outputs; kept with the step that torch.compile made."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Weights and caches are freed."""
        self.function: Callable | None = None
        self.inputs: Sequence[Any] = ()
        self.outputs: Sequence[torch.Tensor] = ()

    def bind(self, args: Sequence[Any], length: int | None, result: Any) -> "Bound | None":
        """The inputs for more calls like it; None if it is not clear where they come from. The call is forgotten.

        Args:
            args: of the step in that call.
            length: the one that is dynamic, if there is one.
            result: of the step in that call.
        """
        function, inputs, outputs = self.function, self.inputs, self.outputs
        self.forget()
        argument = {id(leaf): i for i, leaf in enumerate(tree_leaves(args)) if isinstance(leaf, torch.Tensor)}
        output = {id(tensor): i for i, tensor in enumerate(outputs)}
        lengths = [i for i, value in enumerate(inputs) if not isinstance(value, torch.Tensor)]
        leaves, structure = tree_flatten(result)
        if any(inputs[i] != length for i in lengths) or any(
            id(leaf) not in output and isinstance(leaf, torch.Tensor) for leaf in leaves
        ):
            return None
        return Bound(
            function,
            list(inputs),
            [(i, argument[id(value)]) for i, value in enumerate(inputs) if id(value) in argument],
            lengths,
            [output.get(id(leaf)) for leaf in leaves],
            structure,
        )


class Backend:
    """Inductor as a backend of torch.compile that notes the calls of what it compiled.

    torch keeps backends as long as the process, so this one refers to nothing that it made.

    Args:
        options: of inductor.
        last: where the last call is noted.
    """

    def __init__(self, options: dict[str, Any], last: LastCall) -> None:
        self.options, self.last = options, weakref.ref(last)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        function, last = compile_fx(graph, inputs, config_patches=self.options), self.last()

        def call(*inputs: Any) -> Sequence[torch.Tensor]:
            outputs = function(*inputs)
            last.function, last.inputs, last.outputs = function, inputs, outputs
            return outputs

        return call


class Bound:
    """A compiled function with its weights and caches in place.

    Args:
        compiled: the function.
        inputs: of its first call.
        moving: which of them are which of the step's arguments.
        lengths: which of them are the dynamic length.
        outputs: for each part of the step's result, which of the function's outputs it is; None is None.
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
        self._let_go()

    def _let_go(self) -> None:
        """Of the arguments: what one CUDA graph made and another one reads is gone with the round."""
        for i, _ in self.moving:
            self.inputs[i] = None

    def __call__(self, args: Sequence[Any], length: int | None) -> Any:
        """The step's result for other arguments of the same kinds."""
        leaves = tree_leaves(args)
        for i, argument in self.moving:
            self.inputs[i] = leaves[argument]
        for i in self.lengths:
            self.inputs[i] = length
        outputs = self.compiled(*self.inputs)
        self._let_go()
        return tree_unflatten([None if i is None else outputs[i] for i in self.outputs], self.structure)
