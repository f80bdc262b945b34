"""What steps do on a GPU, without one: graphs that dynamo makes run on the CPU, or stand-ins are called for them."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers.compiled import LONG, LONGER, OTHER_WAYS, SHORT, WAYS, make_small, run
from helpers.speculation import plain

from layerskip_recipes.generation import engine
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.kernels import compiling
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.steps import StepContext, choose_token
from layerskip_recipes.model.kv_cache import BLOCK, BlockAttention, visible, visible_tree


@pytest.fixture
def no_cuda(monkeypatch):
    """The calls of CUDA do nothing."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)


@pytest.fixture
def gpu_steps(no_cuda, monkeypatch):
    """The compiled steps of a model as on a GPU; dynamo makes their graphs, which run on the CPU."""
    steps, compile = CompiledSteps(torch.device("cuda")), torch.compile
    monkeypatch.setattr(engine, "compiled_steps", lambda _: steps)
    monkeypatch.setattr(StepContext, "_decoder_in_cpp", lambda _: None)
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile(function, fullgraph=True, backend="eager", dynamic=False)
    )
    return steps


# ---- FlexAttention ----


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", ["text", "tree"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("queries", [1, 4, 50])
def test_attention_by_blocks(kind, group, queries):
    """Against a softmax over the visible slots alone, within the first block of a cache, across its end, and behind."""
    torch.manual_seed(81)
    starts, slots, dim = [3, BLOCK - 2, 2 * BLOCK + 9], 3 * BLOCK, 16
    q = torch.randn(3, 2 * group, queries, dim)
    k, v = torch.randn(2, 3, 2, slots, dim)
    root = torch.tensor(starts)
    ancestors = torch.rand(3, queries, 5) < 0.4
    ancestors[:, :, 0] = True
    at = root[:, None] + torch.arange(queries)
    seen = visible(at) if kind == "text" else visible_tree(root, ancestors)
    shape = q.shape
    attention = BlockAttention(seen, slots)
    out = attention(q.reshape(3, 2, group * queries, dim), k, v).reshape(shape)
    # Without a GPU torch looks at no blocks. Those that the kernel reads are one row of a table for all queries.
    last = at[:, -1] if kind == "text" else root + 4
    read = torch.arange(3) * BLOCK <= last[:, None]
    assert torch.equal(attention.block_mask(group * queries).to_dense().bool(), read[:, None, None])
    for row, start in enumerate(starts):
        for query in range(queries):
            nodes = [start + node for node in range(5) if ancestors[row, query, node]]
            those = [*range(start), *nodes] if kind == "tree" else [*range(start + query + 1)]
            for head in range(2 * group):
                keys, values = k[row, head // group, those], v[row, head // group, those]
                expected = (keys @ q[row, head, query] / dim**0.5).softmax(0) @ values
                torch.testing.assert_close(out[row, head, query], expected)


@pytest.mark.parametrize("way", [*WAYS, "looked up"])
def test_one_graph_of_a_gpu_serves_all_lengths(way, gpu_steps):
    """Texts of some 10 to 260 tokens, which need three blocks; greedy, against decoding from scratch."""
    model, graphs = make_small(width=32), None
    for prompts, count in ((LONG[:1], 9), (SHORT[:1], 5), (LONGER, 24)):
        speculation = Speculation(**OTHER_WAYS[way]) if OTHER_WAYS[way] else None
        generation = run(model, prompts, count, speculation=speculation, reserve=270)
        assert generation.generated == [plain(model, prompt, count) for prompt in prompts]
        assert generation.context.fits_flex and not gpu_steps.masked and not gpu_steps.refused
        if way in WAYS:  # a look-up's length decides what else is compiled
            graphs = graphs or dict(gpu_steps.graphs)
            assert gpu_steps.graphs == graphs
    assert generation.stats.accepted > 0 or way == "plain"


def test_where_flex_attention_is_not_possible_graphs_have_masks(gpu_steps, monkeypatch):
    """As where a GPU is too old for it: a line for each kind of step says so, and its round begins again."""
    model, warnings = make_small(width=32), []

    def attention(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(BlockAttention, "__call__", attention)
    monkeypatch.setattr(compiling.log, "warning", lambda message, *args: warnings.append(message % args))
    generation = run(model, LONGER, 24, speculation=Speculation(**WAYS["chain"]), reserve=270)
    assert generation.generated == [plain(model, prompt, 24) for prompt in LONGER]
    assert not gpu_steps.refused and len(gpu_steps.masked) == len(warnings) == 2
    for name, warning in zip(("draft_token", "verify_greedily"), warnings, strict=True):
        assert warning.startswith(f"compile: not possible for {name} with FlexAttention")
    # A graph for 256 slots, and one for 512.
    lengths = {key[1] for key in gpu_steps.graphs if isinstance(key[1], int)}
    assert lengths == {256, 512}


def test_what_flex_attention_cannot_do(gpu_steps):
    """Its kernel needs heads of 16 numbers; an uncompiled generation may have made a cache of any length."""
    assert not run(make_small(width=16), SHORT, 3).context.fits_flex
    gpu_steps._caches.clear()
    model = make_small(width=32)
    before = run(model, SHORT, 3, compile=False, reserve=500)
    generation = run(model, SHORT, 3, cache=before.cache)
    assert generation.cache.max_len == 500 and not generation.context.fits_flex
    assert run(model, SHORT, 3).context.fits_flex


# ---- graphs that fail, and what is captured ----


@pytest.mark.parametrize("way", ["plain", "chain", "tree"])
@pytest.mark.parametrize("nth", [1, 4])
def test_after_a_graph_that_failed_half_way_the_round_begins_again(way, nth, monkeypatch):
    """On a GPU the capture of a graph may fail when the step has moved slots. Here each kind of step fails once, after
    it ran, and what the cache holds is spoilt."""
    model, calls = make_small(), Counter()

    def call(self, step, slots, *args):
        result = step.run(slots, *args)
        name = step.function.__name__
        calls[name] += 1
        if calls[name] == nth:
            for layer in step.context.cache.layers:
                layer.k.fill_(3.0)
            raise compiling.GraphError(name)
        return result

    monkeypatch.setattr(compiling.CompiledSteps, "__call__", call)
    speculation = Speculation(**WAYS[way]) if WAYS[way] else None
    generation = run(model, SHORT, 12, speculation=speculation)
    assert generation.generated == [plain(model, prompt, 12) for prompt in SHORT]
    assert max(calls.values()) > nth and generation.stats.tokens == 24


@pytest.mark.parametrize("replays", [0, 2])
def test_a_graph_that_fails_on_a_gpu_is_not_used_again(replays, no_cuda, monkeypatch):
    """At its first call or at a later one, as when the memory for another capture is missing."""
    steps, calls = CompiledSteps(torch.device("cuda")), []

    def graph(*_):
        calls.append(1)
        if len(calls) > replays:
            raise RuntimeError("out of memory")
        return "by its graph"

    monkeypatch.setattr(compiling, "_compiled", lambda *_: graph)
    models = {"model": torch.nn.Linear(1, 1), "draft_model": torch.nn.Linear(1, 1)}
    context = SimpleNamespace(**models)
    step = SimpleNamespace(
        context=context, settings=(), function=choose_token, key=lambda *_: "key", run=lambda *_: "without"
    )
    for _ in range(replays):
        steps.begin_round()
        assert steps(step, None) == "by its graph"
    steps.begin_round()
    with pytest.raises(compiling.GraphError, match=r"choose_token.*compile=false"):
        steps(step, None)
    assert steps(step, None) == "without" and len(calls) == replays + 1


def test_a_failed_graph_ends_a_run_of_several_processes(monkeypatch):
    """The other ranks have not failed: they wait in a collective, and do not begin the round again."""

    def call(self, step, slots, *args):
        raise compiling.GraphError("choose_token")

    monkeypatch.setattr(compiling.CompiledSteps, "__call__", call)
    with pytest.raises(compiling.GraphError):
        run(make_small(), SHORT, 12, shared=True)


def test_a_path_with_a_new_step_is_captured_in_the_next_round(no_cuda, monkeypatch):
    """CUDA graphs: where one step of a round runs for the first time, none after it is captured."""
    monkeypatch.setattr(compiling, "_compiled", lambda function, *_: function)

    class Named:
        context, settings = SimpleNamespace(model=make_small(), draft_model=make_small()), ()

        def __init__(self, name):
            self.function, self.key = lambda *_: None, lambda: name

    graphs, steps = CompiledSteps(torch.device("cuda")), {name: Named(name) for name in ("old", "new")}
    captured = []
    for names in (("old",), ("old",), ("new", "old"), ("new", "old"), ("new", "old")):
        graphs.begin_round()
        for name in names:
            graphs(steps[name], None)
        captured.append(graphs.captured.copy())
    alone, both = {("old",)}, {("old",), ("new",), ("new", "old")}
    assert captured == [set(), alone, alone, both, both]
