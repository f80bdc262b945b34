"""Products and attention of few rows in C++ (few_rows.cpp): the formula, the same bits for any number of rows, and
where compiled steps use them."""

import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import SIZE
from torch.fx.experimental.proxy_tensor import make_fx
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels.few_rows import MOST_QUERIES, MOST_ROWS, SDPA, FewRows, load_kernel

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("k", [16, 48, 576, 2064, 9232])  # the last two are multiplied in pieces
@pytest.mark.parametrize("n", [1, 5, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_products_of_few_rows(n, k, dtype):
    """x W^T, of several W side by side, and each row of it to the last bit what it is alone."""
    load_kernel()
    generator = torch.Generator().manual_seed(n * k)
    x, w = torch.randn(21, k, generator=generator), torch.randn(n, k, generator=generator)
    w = (60 * w).clamp(-128, 127).to(dtype) if dtype == torch.int8 else w.to(dtype)
    alone = torch.cat([torch.ops.layerskip.linear(row[None], w) for row in x])
    atol = (6e-3 if dtype == torch.int8 else 1e-4) * max(1, k / 576)
    torch.testing.assert_close(alone, (x.double() @ w.double().T).float(), atol=atol, rtol=1e-4)
    few, half = w[:3].contiguous(), w[n // 2 :].contiguous()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for rows in range(1, 22):
            assert torch.equal(torch.ops.layerskip.linear(x[:rows], w), alone[:rows])
            two = torch.ops.layerskip.linear2(x[:rows], few, w)
            assert torch.equal(two, torch.cat([alone[:rows, :3], alone[:rows]], 1))
            three = torch.ops.layerskip.linear3(x[:rows], w, half, few)
            assert torch.equal(three, torch.cat([alone[:rows], alone[:rows, n // 2 :], alone[:rows, :3]], 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.ops.layerskip.linear(x.T.contiguous().T, w), alone)
    with pytest.raises(RuntimeError):
        torch.ops.layerskip.linear(x, w.T)
    with pytest.raises(RuntimeError):
        torch.ops.layerskip.linear(x.double(), w.double())
    with pytest.raises(RuntimeError):
        torch.ops.layerskip.linear(x[:, :12], w[:, :12].contiguous())


def test_which_products_of_a_graph_are_of_few_rows():
    """Those of 1 .. MOST_ROWS rows of whole vectors with a weight as it is stored, with a bias or without.

    In bf16 the sum is rounded once, at the end.
    """
    load_kernel()
    x, w, bias = torch.randn(7, 16), torch.randn(5, 16), torch.randn(5)
    int8 = torch.arange(-40, 40, dtype=torch.int8).view(5, 16)
    cases = {
        "linear": (lambda x, w, b: x @ w.T, (x, w, bias), True),
        "bias": (lambda x, w, b: torch.addmm(b, x, w.T), (x, w, bias), True),
        "two of the same x": (lambda x, v, w: (x @ w.T).sum(1) * (x @ v.T).sum(1), (x, w, torch.randn(4, 16)), True),
        "int8": (lambda x, w, b: x @ w.to(x.dtype).T * b, (x, int8, bias), True),
        "int8 and a bias": (lambda x, w, b: torch.addmm(b, x, w.T.to(x.dtype)), (x, int8, bias), True),
        "bf16": (lambda x, w, b: x @ w.T, [t.bfloat16() for t in (x, w, bias)], True),
        "bf16 and a bias": (lambda x, w, b: torch.addmm(b, x, w.T), [t.bfloat16() for t in (x, w, bias)], True),
        "two in bf16": (
            lambda x, v, w: (x @ w.T).sum(1) * (x @ v.T).sum(1),
            [t.bfloat16() for t in (x, w, torch.randn(4, 16))],
            True,
        ),
        "int8 beside bf16": (lambda x, w, b: x @ w.to(x.dtype).T * b, (x.bfloat16(), int8, bias.bfloat16()), True),
        "bf16 beside fp32": (lambda x, w, b: x @ w.float().T, (x, w.bfloat16(), bias), False),
        "int8 with scales inside": (lambda x, w, b: x @ (w.to(x.dtype) * b[:, None]).T, (x, int8, bias), False),
        "int16": (lambda x, w, b: x @ w.T.to(x.dtype), (x, int8.short(), bias), False),
        "half a bias": (lambda x, w, b: torch.addmm(b, x, w.T, beta=0.5), (x, w, bias), False),
        "many rows": (lambda x, w, b: x @ w.T, (torch.randn(MOST_ROWS + 1, 16), w, bias), False),
        "narrow": (lambda x, w, b: x @ w.T, (x[:, :12], w[:, :12].contiguous(), bias), False),
        "double": (lambda x, w, b: x @ w.T, (x.double(), w.double(), bias), False),
        "no transposed weight": (lambda x, w, b: x @ w, (x, w.T.contiguous(), bias), False),
        "a computed weight": (lambda x, w, b: x @ (2 * w).T, (x, w, bias), False),
        "a column-major weight": (lambda x, w, b: x @ w.T, (x, w.T.contiguous().T, bias), False),
    }
    for case, (function, inputs, ours) in cases.items():
        graph = make_fx(function, tracing_mode="fake")(*inputs)
        for node in graph.graph.nodes:  # as inductor has it by then
            if node.target is torch.ops.aten.t.default:
                node.target, node.args = torch.ops.aten.permute.default, (node.args[0], [1, 0])
            elif node.target is torch.ops.aten._to_copy.default:
                convert, source = torch.ops.prims.convert_element_type.default, node.args[0]
                node.target, node.args, node.kwargs = convert, (source, node.kwargs["dtype"]), {}
        FewRows()(graph.graph)
        graph.recompile()
        targets = {node.target for node in graph.graph.nodes}
        few = torch.ops.layerskip.linear2 if case.startswith("two") else torch.ops.layerskip.linear
        assert (few.default in targets) == ours, case
        assert targets.isdisjoint({torch.ops.aten.mm.default, torch.ops.aten.addmm.default}) == ours, case
        # Sums of fp32 products in another order than torch's, which differs between processors.
        result, expected = graph(*inputs), function(*inputs)
        near = 2e-2 if expected.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            result, expected, atol=near, rtol=near, msg=lambda text, case=case: f"{case}: {text}"
        )


def attend(q, k, v, mask):
    load_kernel()
    return torch.ops.layerskip.attention(q, k, v, mask, q.shape[-1] ** -0.5)


def example(b, h, s, d, slots, generator):
    """Queries at the last filled slots of a cache that is longer than what attention sees."""
    q = torch.randn(b, s, h, d, generator=generator).transpose(1, 2)
    k, v = (torch.randn(b, h, slots + 9, d, generator=generator)[:, :, :slots] for _ in range(2))
    at = slots - s - torch.randint(0, 3, (b, 1), generator=generator) + torch.arange(s)
    mask = torch.where(torch.arange(slots) <= at[..., None], 0.0, -torch.inf)[:, None]
    return q, k, v, mask


@pytest.mark.parametrize("slots", [24, 64, 157])
@pytest.mark.parametrize(("b", "h", "d"), [(1, 2, 64), (2, 3, 16), (1, 1, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_formula_and_the_same_bits_for_any_number_of_queries(dtype, b, h, d, slots):
    """softmax(q k^T / sqrt(d) + mask) v in fp64; a query alone, with others or beside more unseen slots: the same."""
    q, k, v, mask = example(b, h, 19, d, slots, torch.Generator().manual_seed(slots * d))
    k, v = k.to(dtype), v.to(dtype)
    scores = q.double() @ k.double().transpose(2, 3) / d**0.5 + mask
    alone = torch.cat([attend(q[:, :, i : i + 1], k, v, mask[:, :, i : i + 1]) for i in range(19)], 2)
    torch.testing.assert_close(alone, (scores.softmax(-1) @ v.double()).float(), atol=1e-5, rtol=1e-5)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for rows in (2, 3, 4, 5, 7, 8, 9, 16, 19):
            assert torch.equal(attend(q[:, :, :rows], k, v, mask[:, :, :rows]), alone[:, :, :rows])
    finally:
        torch.set_num_threads(before)
    if slots == 64:
        more = [F.pad(x, (0, 0, 0, 64), value=3.0) for x in (k, v)]
        assert torch.equal(attend(q, *more, F.pad(mask, (0, 64), value=-torch.inf)), alone)


def sdpa(scale=None, is_causal=None):
    """torch's attention of q, k, v and a mask, as graphs have it."""
    settings = () if is_causal is None else (0.0, is_causal)  # dropout before it
    return lambda q, k, v, mask: SDPA(q, k, v, *settings, attn_mask=mask, scale=scale)[0]


def test_one_mask_for_all_rows_and_what_is_refused():
    q, k, v, mask = example(2, 2, 3, 32, 40, torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:1])
    torch.testing.assert_close(attend(q, k, v, mask[:1]), expected)
    with pytest.raises(RuntimeError):
        attend(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, mask)
    with pytest.raises(RuntimeError):
        attend(q[..., :5], k[..., :5], v[..., :5], mask)


def test_which_attention_of_a_graph_is_of_few_queries():
    """That of 1 .. MOST_QUERIES queries with a mask, in fp32, whose heads are of whole vectors; the results stay."""
    load_kernel()

    def inputs(s=5, d=32):
        return example(1, 2, s, d, 300, torch.Generator().manual_seed(s))

    cases = {
        "few": (inputs(), (), True),
        "a scale": (inputs(), (0.3,), True),
        "many": (inputs(s=MOST_QUERIES + 1), (), False),
        "narrow": (inputs(d=8), (), False),
        "double": ([x.double() for x in inputs()], (), False),
        "bf16": ([x.bfloat16() for x in inputs()], (), True),
        "no mask": ((*inputs()[:3], None), (), False),
        "causal": ((*inputs()[:3], None), (None, True), False),
    }
    for case, (tensors, settings, ours) in cases.items():
        function = sdpa(*settings)
        graph = make_fx(function, tracing_mode="fake")(*tensors)
        FewRows()(graph.graph)
        graph.recompile()
        targets = {node.target for node in graph.graph.nodes}
        assert (torch.ops.layerskip.attention.default in targets) == ours, case
        assert (SDPA in targets) != ours, case
        near = {"atol": 1e-2, "rtol": 2e-2} if case == "bf16" else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(
            graph(*tensors), function(*tensors), **near, msg=lambda text, case=case: f"{case}: {text}"
        )


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 drops the option of torch.compile")
@pytest.mark.slow
def test_compiled_steps_use_attention_of_few_queries():
    """One in each layer: of each drafted token and once more for the last below the exit, of all drafts above it."""
    torch.manual_seed(0)
    model = llama3_2(**SIZE | {"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64}).eval()
    speculation = Speculation(1, 2)
    prompts = [[5, 6, 7, 8]]
    expected = Generation(model, prompts, 9)
    for _ in expected:
        pass
    for _ in Generation(model, prompts, 9, compile=True, speculation=speculation):  # compiles
        pass
    generation = Generation(model, prompts, 9, compile=True, speculation=speculation)
    with torch.profiler.profile() as profile:
        rounds = len(list(generation)) - 1  # the first is the prefill
    calls = Counter(event.name for event in profile.events())
    assert calls["layerskip::attention"] == rounds * (2 * 1 + 1 + 2) > 0
    assert generation.generated == expected.generated
