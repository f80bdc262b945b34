"""Products and attention of a few rows on a CPU: compiled steps use few_rows.cpp for them in place of the BLAS.

A verification of 7 positions then costs little more than a step of one, as each weight is read once for all of them.
Imported only when steps are compiled: inductor takes a second to import.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch._inductor.codecache import CppCodeCache
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.library import Library, register_fake

MOST_ROWS = 64  # of x in x W^T; with more rows the BLAS is faster
_LIBRARY = Library("layerskip", "FRAGMENT")
SOURCE = Path(__file__).with_suffix(".cpp")
aten = torch.ops.aten
VECTOR = 16  # widths are multiples of the longest vector of a processor, in fp32 numbers
MOST_QUERIES = 256  # of all heads that share a key head
VIEWS = (aten.view.default, aten.reshape.default)
CONVERT = torch.ops.prims.convert_element_type.default
PRECISIONS = (torch.float32, torch.bfloat16)
SDPA = aten._scaled_dot_product_flash_attention_for_cpu.default


class _Library(CppCodeCache):
    """Inductor's compiler and its cache on disk, with torch's headers and libraries."""

    cache: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    cpp_compile_command_flags: ClassVar[dict[str, Any]] = {"include_pytorch": True, "shared": True}  # type: ignore[misc]


@cache
def define_operators() -> Future[Any]:
    """Declare the operators in `torch.ops.layerskip`, and begin to compile them in a thread, beside what comes next.

    `linear`, `linear2` and `linear3` take x [m, k] in fp32 and one to three weights [n_i, k] in fp32, bf16 or int8,
    k a multiple of VECTOR; the result is x W^T of each, side by side, [m, n_1 + ..] in fp32. `attention` takes q
    [b, h, s, d] in fp32, k and v [b, h, slots, d] in fp32 or bf16, a mask to be added [b or 1, 1, s, slots] and the
    scale of the scores; the result is in fp32. All sums are taken in fp32.
    """
    _LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor")
    for name, weights in (("linear", "a"), ("linear2", "a b"), ("linear3", "a b c")):
        _LIBRARY.define(f"{name}(Tensor x, {', '.join(f'Tensor {w}' for w in weights.split())}) -> Tensor")

        @register_fake(f"layerskip::{name}")
        def _(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))

    @register_fake("layerskip::attention")
    def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)

    # Take torch's word for the vectors of this processor: inductor would compile and run a program for each kind.
    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True} if known else {}):
        pick_vec_isa()  # it is looked for once in a process
    return ThreadPoolExecutor(1).submit(_Library.load, SOURCE.read_text())


def load_kernel() -> None:
    """Wait until few_rows.cpp is compiled, or found compiled: the operators can be called.

    Raises:
        Exception: what inductor raises without a C++ compiler.
    """
    define_operators().result()


class FewRows(CustomGraphPass):
    """Replaces x W^T (+ bias) in a graph where x has 1 .. MOST_ROWS rows, of whole vectors, and W is a weight as
    it is stored: of x's precision, fp32 or bf16, or in int8 (torchao's weight-only, whose scales come afterwards).

    The kernels take and give fp32; in a graph of bf16 inductor fuses the conversions with the operations around them.
    Products of the same x, as of q, k and v, become one: in a small model the calls cost as much as the numbers.
    Attention of few queries over a cache is replaced too.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        linear = torch.ops.layerskip.linear.default
        products: dict[Any, list[torch.fx.Node]] = {}
        wide: dict[Any, torch.fx.Node] = {}  # what is in bf16 before, in fp32
        for node in [*graph.nodes]:
            if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
                continue
            *bias, x, transposed = node.args
            if (weight := _weight(x, transposed)) is None:
                continue
            # The same numbers in the same shape, whether or not each product has a view of its own.
            same = (x.args[0], x.meta["val"].shape) if x.target in VIEWS else x
            with graph.inserting_before(node):
                product = graph.call_function(linear, (_in_fp32(graph, x, wide, same), weight))
                product.meta["val"] = node.meta["val"].float()
                result = product
                if bias:
                    result = graph.call_function(aten.add.Tensor, (product, _in_fp32(graph, bias[0], wide)))
                    result.meta["val"] = product.meta["val"]
                _replace(graph, node, result)
            products.setdefault(same, []).append(product)
        for nodes in products.values():
            if len(nodes) in (2, 3):
                _join(graph, nodes)
        for node in graph.find_nodes(op="call_function", target=SDPA):
            _attend(graph, node, wide)
        graph.eliminate_dead_code()

    def uuid(self) -> str:
        """Names what the pass does, for the cache of compiled graphs."""
        return hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes()).hexdigest()


def _weight(x: torch.fx.Node, transposed: torch.fx.Node) -> torch.fx.Node | None:
    """The stored W of a product x W^T that few_rows.cpp can do, else None."""
    weight: Any = transposed
    conversions = []
    while weight.target in (aten.permute.default, CONVERT):
        conversions.append(weight.target)
        weight = weight.args[0]
    value = x.meta["val"]
    ours = (
        conversions.count(aten.permute.default) == 1
        and isinstance(value.shape[0], int)
        and value.shape[0] <= MOST_ROWS
        and value.dtype in PRECISIONS
        and weight.op == "placeholder"
        and weight.meta["val"].dtype == (torch.int8 if CONVERT in conversions else value.dtype)
        and weight.meta["val"].is_contiguous()
        and weight.meta["val"].shape[1] % VECTOR == 0
    )
    return weight if ours else None


def _in_fp32(
    graph: torch.fx.Graph, node: torch.fx.Node, wide: dict[Any, torch.fx.Node], same: Any = None
) -> torch.fx.Node:
    """The node in fp32, converted at the place where nodes are inserted; `wide` keeps it for others of the same key."""
    if node.meta["val"].dtype == torch.float32:
        return node
    key = same or node
    if key not in wide:
        wide[key] = graph.call_function(CONVERT, (node, torch.float32))
        wide[key].meta["val"] = node.meta["val"].float()
    return wide[key]


def _replace(graph: torch.fx.Graph, node: torch.fx.Node, result: torch.fx.Node) -> None:
    """`result`, which is in fp32, takes the place of a node, in the node's precision."""
    dtype = node.meta["val"].dtype
    if dtype != torch.float32:
        result = graph.call_function(CONVERT, (result, dtype))
        result.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _attend(graph: torch.fx.Graph, node: torch.fx.Node, wide: dict[Any, torch.fx.Node]) -> None:
    """Replace torch's attention by `layerskip::attention` if the node has few queries and a mask."""
    q, mask = node.args[0].meta["val"], node.kwargs.get("attn_mask")
    rows, width = q.shape[2:]
    few = isinstance(rows, int) and rows <= MOST_QUERIES
    if not few or mask is None or len(node.args) > 3 or q.dtype not in PRECISIONS or width % VECTOR:
        return
    scale = node.kwargs.get("scale")
    output = next(user for user in node.users if user.args[1] == 0)
    if any(user.users for user in node.users if user is not output):  # its second result, for gradients
        return
    with graph.inserting_before(node):
        query, mask = _in_fp32(graph, node.args[0], wide), _in_fp32(graph, mask, wide)  # type: ignore[arg-type]
        inputs = (query, *node.args[1:], mask, width**-0.5 if scale is None else scale)
        ours = graph.call_function(torch.ops.layerskip.attention.default, inputs)
        ours.meta["val"] = output.meta["val"].float()
        _replace(graph, output, ours)
    # eliminate_dead_code keeps the attention op, which may draw random numbers (dropout): erase it here.
    for dead in (*node.users, node):
        graph.erase_node(dead)


def _join(graph: torch.fx.Graph, nodes: list[torch.fx.Node]) -> None:
    """One product in place of several of the same x, and a slice of it in place of each."""
    target = getattr(torch.ops.layerskip, f"linear{len(nodes)}").default
    first, values = nodes[0], [node.meta["val"] for node in nodes]
    with graph.inserting_before(first):
        joined = graph.call_function(target, (first.args[0], *(node.args[1] for node in nodes)))
        joined.meta["val"] = torch.cat(values, 1)
        start = 0
        for node, value in zip(nodes, values, strict=True):
            end = start + value.shape[1]
            part = graph.call_function(aten.slice.Tensor, (joined, 1, start, end))
            part.meta["val"] = joined.meta["val"][:, start:end]
            node.replace_all_uses_with(part)
            start = end
