"""What steps do on a GPU, without one: graphs that dynamo makes run on the CPU, or stand-ins are called for them."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.compiled import LONG, LONGER, OTHER_WAYS, SHORT, WAYS, make_small, run
from helpers.decoding import model_of
from helpers.speculation import PROMPTS, plain

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.kernels import compiling
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.state import ModelState
from layerskip_recipes.model.kv_cache import BLOCK_SLOTS, BlockAttention


@pytest.fixture
def no_cuda(monkeypatch):
    """The calls of CUDA do nothing."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)


@pytest.fixture
def gpu_steps(no_cuda, traced, monkeypatch):
    """The compiled steps of a model as on a GPU; dynamo makes their graphs, which run on the CPU."""
    steps = CompiledSteps(torch.device("cuda"))
    monkeypatch.setattr(ModelState, "compiled_steps", lambda *_: steps)
    return steps


# ---- FlexAttention ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("queries", [1, 4, 50])
@pytest.mark.parametrize("window", [None, 30])
def test_attention_by_blocks_is_a_softmax_over_the_visible_slots(window, group, queries):
    """Against a softmax over the visible slots alone, within the first block of a cache, across its end, and behind."""
    torch.manual_seed(81)
    starts, slots, dim = [3, BLOCK_SLOTS - 2, 2 * BLOCK_SLOTS + 9], 3 * BLOCK_SLOTS, 16
    q = torch.randn(3, 2 * group, queries, dim)
    k, v = torch.randn(2, 3, 2, slots, dim)
    at = torch.tensor(starts)[:, None] + torch.arange(queries)
    attention = BlockAttention(at, slots, window)
    out = attention(q.reshape(3, 2, group * queries, dim), k, v).reshape(q.shape)
    # Without a GPU torch looks at no blocks. Those that the kernel reads are one row of a table for all queries.
    read = torch.arange(3) * BLOCK_SLOTS <= at[:, -1:]
    assert torch.equal(attention.block_mask(group * queries).to_dense().bool(), read[:, None, None])
    for row, start in enumerate(starts):
        for query in range(queries):
            for head in range(2 * group):
                end = start + query + 1
                seen = slice(0 if window is None else max(end - window, 0), end)
                keys, values = (cached[row, head // group, seen] for cached in (k, v))
                expected = (keys @ q[row, head, query] / dim**0.5).softmax(0) @ values
                torch.testing.assert_close(out[row, head, query], expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "looked up"])
def test_one_graph_of_a_gpu_serves_all_lengths(way, gpu_steps):
    """Texts of some 10 to 260 tokens, which need three blocks; greedy, against decoding from scratch."""
    model, graphs = make_small(width=32), None
    for prompts, count in ((LONG[:1], 9), (SHORT[:1], 5), (LONGER, 24)):
        generation = run(model, prompts, count, speculation=OTHER_WAYS[way], reserve=270)
        assert generation.generated == [plain(model, prompt, count) for prompt in prompts]
        assert generation.context.backend.fits_flex and not gpu_steps.masked and not gpu_steps.refused
        if way in WAYS:  # a look-up's length decides what else is compiled
            graphs = graphs or dict(gpu_steps.graphs)
            assert gpu_steps.graphs == graphs
    assert generation.stats.accepted > 0 or way == "plain"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "lfm2"])
def test_graphs_of_a_gpu_run_windows_and_convolutions(family, gpu_steps):
    model = model_of(family)
    model = model.with_modules(layers=model.layers[:3])  # of each kind
    generation = run(model, PROMPTS, 18, rows=2, speculation=Speculation(2, 4))
    assert generation.generated == [plain(model, prompt, 18) for prompt in PROMPTS]
    assert gpu_steps.graphs and not gpu_steps.masked and not gpu_steps.refused


@pytest.mark.slow
def test_where_flex_attention_is_not_possible_graphs_have_masks(gpu_steps, monkeypatch):
    model, warnings = make_small(width=32), []

    def attention(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(BlockAttention, "__call__", attention)
    monkeypatch.setattr(compiling.log, "warning", lambda message, *args: warnings.append(message % args))
    generation = run(model, LONGER, 24, speculation=WAYS["chain"], reserve=270)
    assert generation.generated == [plain(model, prompt, 24) for prompt in LONGER]
    assert not gpu_steps.refused and len(gpu_steps.masked) == len(warnings) == 2
    for name, warning in zip(("draft_token", "draft_logits"), warnings, strict=True):
        assert warning.startswith(f"compile: not possible for {name} with FlexAttention")
    # A graph for 256 slots, and one for 512.
    lengths = {key[1] for key in gpu_steps.graphs if isinstance(key[1], int)}
    assert lengths == {256, 512}


@pytest.mark.slow
def test_narrow_heads_and_odd_cache_lengths_do_not_fit_flex_attention(gpu_steps):
    """Its kernel needs heads of 16 numbers; an uncompiled generation may have made a cache of any length."""
    assert not run(make_small(width=16), SHORT, 3).context.backend.fits_flex
    gpu_steps._caches.clear()
    model = make_small(width=32)
    before = run(model, SHORT, 3, compile=False, reserve=500)
    generation = run(model, SHORT, 3, cache=before.cache)
    assert generation.cache.max_len == 500 and not generation.context.backend.fits_flex
    assert run(model, SHORT, 3).context.backend.fits_flex


# ---- threads and caches ----


@pytest.mark.slow
def test_any_thread_can_have_cuda_graphs(no_cuda):
    """torch 2.6 to 2.12 look for a thread's table of graphs, and fail where neither torch nor a round has made one."""

    def has_table(begins):
        if begins:
            CompiledSteps(torch.device("cuda")).begin_round()
        return torch._C._is_key_in_tls("tree_manager_containers")

    for begins in (False, True):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(has_table, begins).result() is begins


def test_caches_are_kept_by_their_size(monkeypatch):
    """Those used last, up to a number of bytes beside the one in use."""
    model, steps = make_small(), CompiledSteps(torch.device("cpu"))

    def use(rows):
        cache = steps.cache(10, model, rows, 10, 0)
        cache.allocate(model, model.num_layers)
        return cache

    caches = [use(rows) for rows in (1, 2, 4)]
    assert [use(rows) for rows in (1, 2, 4)] == caches
    # A slot has 2 layers x 2 (keys, values) x 8 numbers in fp32.
    assert caches[2].num_bytes == 4 * 10 * 2 * 2 * 8 * 4
    monkeypatch.setattr(compiling, "KEPT_BYTES", caches[1].num_bytes)
    assert use(4) is caches[2]  # beside it there is room for the cache of 2 rows
    assert use(1) is not caches[0]


# ---- graphs that fail, and what is captured ----


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nth", [1, 4])
def test_a_graph_that_fails_half_way_changes_no_token(way, nth, gpu_steps, monkeypatch):
    """Its capture may fail when the step has written into the cache. Here each kind of step fails after it ran."""
    model, calls = make_small(), Counter()

    def made(function, *_):
        def graph(*args):
            out = function(*args)
            calls[function.__name__] += 1
            if calls[function.__name__] == nth:
                raise RuntimeError("out of memory")
            return out

        return graph

    monkeypatch.setattr(compiling, "_compiled", made)
    generation = run(model, SHORT, 12, speculation=WAYS[way])
    assert generation.generated == [plain(model, prompt, 12) for prompt in SHORT]
    assert min(calls.values()) >= nth and len(gpu_steps.refused) == len(calls)
