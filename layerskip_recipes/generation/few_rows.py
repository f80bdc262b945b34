"""Matrix products of a few rows on a CPU: compiled steps use few_rows.cpp for them, not the BLAS.

A verification of 7 positions then costs little more than a step of one, as each weight is read once for all of them.
Imported only where steps are compiled: inductor takes a second to import.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch._inductor.codecache import CppCodeCache
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.library import register_fake

MOST_ROWS = 32  # more are a BLAS's work
SOURCE = Path(__file__).with_suffix(".cpp")
aten = torch.ops.aten


class _Library(CppCodeCache):
    """Inductor's compiler and its cache on disk, with torch's headers and libraries."""

    cache: ClassVar[dict[str, Any]] = {}
    cpp_compile_command_flags: ClassVar[dict[str, Any]] = {"include_pytorch": True, "shared": True}


@cache
def load_kernel() -> None:
    """Compile few_rows.cpp, or find it compiled, and register `torch.ops.layerskip.linear`.

    Its arguments are x [m, k] and the weight [n, k], fp32, the result is x W^T [m, n].

    Raises:
        Exception: what inductor raises without a C++ compiler.
    """
    _Library.load(SOURCE.read_text())

    @register_fake("layerskip::linear")
    def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], weight.shape[0])


class FewRows(CustomGraphPass):
    """Replaces x W^T (+ bias) in a graph where x has 1 .. MOST_ROWS rows and W is a weight in fp32, as it is stored."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        linear = torch.ops.layerskip.linear.default
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            x, transposed = node.args
            if _fits(x, transposed):
                node.target, node.args = linear, (x, transposed.args[0])
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias, x, transposed = node.args
            if _fits(x, transposed) and not node.kwargs:
                with graph.inserting_before(node):
                    product = graph.call_function(linear, (x, transposed.args[0]))
                product.meta["val"] = node.meta["val"]
                node.target, node.args = aten.add.Tensor, (product, bias)
        graph.eliminate_dead_code()

    def uuid(self) -> str:
        """Names what the pass does, for the cache of compiled graphs."""
        return hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes()).hexdigest()


def _fits(x: torch.fx.Node, transposed: torch.fx.Node) -> bool:
    if transposed.target is not aten.permute.default:
        return False
    rows, weight = x.meta["val"].shape[0], transposed.args[0]
    return (
        isinstance(rows, int)
        and rows <= MOST_ROWS
        and weight.op == "placeholder"
        and weight.meta["val"].dtype == torch.float32
        and weight.meta["val"].is_contiguous()
    )
