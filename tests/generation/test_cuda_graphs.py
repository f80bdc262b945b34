"""Compiled steps as CUDA graphs: the tokens of the CPU, graphs that serve later calls, one wait of the host a round."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.compiled import LONG, LONGER, OTHER_WAYS, SHORT, WAYS, compiled_steps, make_small, run
from helpers.speculation import plain
from torch._dynamo.utils import counters

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.model.kv_cache import BLOCK_SLOTS, BlockAttention, causal_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def graphs_ran():
    """Inductor skipped no CUDA graph; without one the tokens would be the same."""
    counters["inductor"].clear()
    yield
    assert counters["inductor"]["cudagraph_skips"] == 0


WIDTHS = {"masks": 16, "FlexAttention": 32}  # heads of 8 numbers are too small for FlexAttention


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("way", WAYS)
def test_tokens_by_cuda_graphs_are_those_of_the_cpu(way, width):
    """Greedy in fp32, a batch of two, each call's rounds on the same graphs; the reference runs on the CPU."""
    model, reference = make_small(width=width).cuda(), make_small(width=width)
    graphs = None
    for prompts, count in ((SHORT, 40), (LONG, 25), (SHORT, 7)):
        generation = run(model, prompts, count, speculation=WAYS[way])
        assert generation.generated == [plain(reference, prompt, count) for prompt in prompts]
        assert not compiled_steps(model).failed and not compiled_steps(model).masked
        assert generation.context.backend.fits_flex == (width == 32)
        graphs = graphs or dict(compiled_steps(model).graphs)
        assert compiled_steps(model).graphs == graphs
        assert way == "plain" or generation.stats.draft_s > 0
    assert generation.stats.compile_s == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_tokens_of_one_row_by_longer_cuda_graphs_are_those_of_the_cpu(way, width, dtype):
    """One row, whose products and writes are other kernels, and a text that needs longer graphs with masks on the way;
    in fp32 the tokens of the CPU."""
    model, reference = make_small(width=width).to("cuda", dtype), make_small(width=width)
    for prompts, count in ((SHORT[:1], 40), (LONGER, 60), (LONGER, 60)):
        generation = run(model, prompts, count, speculation=OTHER_WAYS[way])
        assert len(generation.generated[0]) == count
        assert not compiled_steps(model).refused and not compiled_steps(model).masked
        if dtype == torch.float32:
            assert generation.generated == [plain(reference, prompt, count) for prompt in prompts]


@pytest.mark.parametrize(("group", "queries"), [(3, 1), (3, 7), (8, 17)])
def test_attention_by_blocks_is_masked_attention(group, queries):
    """Rows of different lengths; with 128 queries and more for each key head torch has another kernel."""
    torch.manual_seed(82)
    q, (k, v) = torch.randn(2, 2, group * queries, 64), torch.randn(2, 2, 2, 5 * BLOCK_SLOTS, 64)

    def attention(q, k, v, root):
        at = root[:, None] + torch.arange(queries, device=root.device)
        if q.is_cuda:
            return BlockAttention(at, k.shape[2])(q, k, v)
        mask = causal_mask(at, torch.arange(k.shape[2]), q.dtype).repeat(1, group, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])

    inputs = (q, k, v, torch.tensor([3, 2 * BLOCK_SLOTS - 2]))
    out = torch.compile(attention, fullgraph=True, dynamic=False)(*(tensor.cuda() for tensor in inputs))
    torch.testing.assert_close(out.cpu(), attention(*inputs))


def test_a_quantised_draft_runs_as_cuda_graphs():
    model, reference = make_small().cuda(), make_small()
    for prompts in (SHORT[:1], SHORT, LONGER):
        generation = run(model, prompts, 30, speculation=Speculation(1, 2, draft_int8=True))
        assert generation.generated == [plain(reference, prompt, 30) for prompt in prompts]
        assert not compiled_steps(model).refused


@pytest.mark.parametrize("way", WAYS)
def test_cuda_graphs_penalise_repetitions_as_the_cpu_does(way):
    """Greedy in fp32, against the CPU."""
    model, reference, sampler = make_small(width=32).cuda(), make_small(width=32), Sampler(repetition_penalty=1.3)
    for prompts in (SHORT, LONG, SHORT):
        found = run(model, prompts, 20, sampler=sampler, speculation=WAYS[way])
        expected = run(reference, prompts, 20, sampler=sampler, compile=False)
        assert found.generated == expected.generated
        assert not compiled_steps(model).refused and not compiled_steps(model).masked


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_whole_rounds_by_one_cuda_graph_have_the_tokens_of_the_cpu(way, width, penalty, monkeypatch):
    """Greedy in fp32. Each call's rounds replay the graphs of the first one; the last text outgrows a mask."""
    monkeypatch.setattr(CompiledSteps, "whole_rounds", True)
    model, reference, sampler = (
        make_small(width=width).cuda(),
        make_small(width=width),
        Sampler(repetition_penalty=penalty),
    )
    for prompts, count in ((SHORT, 40), (LONG, 25), (SHORT, 40), (LONGER, 60)):
        found = run(model, prompts, count, sampler=sampler, speculation=OTHER_WAYS[way])
        expected = run(reference, prompts, count, sampler=sampler, compile=False)
        assert found.generated == expected.generated
    steps = compiled_steps(model)
    assert steps.whole_rounds and not steps.refused and not steps.masked
    assert any(steps.rounds.values()) == (way != "plain") or way == "looked up"


def test_cuda_graphs_repeat_by_the_seed():
    model, outputs = make_small().cuda(), []
    for seed in (1, 1, 2):
        sampler = Sampler(1.0, top_k=20, seed=seed)
        generation = run(model, SHORT, 30, sampler=sampler, speculation=WAYS["chain"])
        outputs.append(generation.generated)
    assert outputs[0] == outputs[1] != outputs[2] and not compiled_steps(model).failed


@pytest.mark.parametrize(("way", "whole_rounds"), [("plain", False), ("chain", False), ("chain", True)])
def test_the_host_waits_once_in_a_round_on_a_gpu(way, whole_rounds, monkeypatch):
    """By torch's own count of calls that wait for the device."""
    monkeypatch.setattr(CompiledSteps, "whole_rounds", whole_rounds)
    model = make_small().cuda()
    for _ in range(2):  # captures
        run(model, SHORT, 20, speculation=WAYS[way])
    generation = Generation(model, SHORT, 20, compile=True, speculation=WAYS[way])
    rounds = iter(generation)
    next(rounds)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            while not all(generation.finished):
                next(rounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    assert len(waits) == generation.stats.rounds > 3
