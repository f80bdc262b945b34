"""Compiled steps give what eager ones give; what is compiled serves later calls; without a compiler eager ones run."""

import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.speculation import PROMPTS, plain
from helpers.tiny import make_tiny
from omegaconf import OmegaConf
from torch.fx.experimental.proxy_tensor import make_fx
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.section import quantised_drafter
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels import compiling
from layerskip_recipes.generation.kernels.compiling import CompiledSteps, compiled_steps, rounded
from layerskip_recipes.generation.kernels.few_rows import MOST_ROWS, FewRows, load_kernel
from layerskip_recipes.generation.sampling import Sampler

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)
CPU = torch.device("cpu")
SIZES = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "intermediate_dim": 32}
VOCAB = 31
# Two rows each, so that graphs serve all. The first length that END's steps see is the largest of its cache.
END = [tuple(range(start, start + 25)) * 8 for start in (2, 5)]
SHORT = [tuple(token % VOCAB for token in prompt) for prompt in PROMPTS[:2]]
LONG = [tuple((3 * token + i) % VOCAB for i, token in enumerate(prompt * 4)) for prompt in PROMPTS[1:3]]


def make_small():
    torch.manual_seed(80)
    model = llama3_2(vocab_size=VOCAB, max_seq_len=512, **SIZES)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return layerskip_decoder(model).eval()


@pytest.fixture(scope="module")
def small():
    """One model for all tests: its graphs stay with it."""
    return make_small()


@pytest.fixture
def not_compiled(monkeypatch):
    """Steps are called as they are, and count as compiled all the same."""
    monkeypatch.setattr(compiling, "_compiled", lambda function, *_: function)


def run(model, prompts, count, *, compile=True, **arguments):
    generation = Generation(model, prompts, count, compile=compile, **arguments)
    for _ in generation:
        pass
    return generation


WAYS = {
    "plain": {},
    "chain": {"exit_layer": 1, "num_speculations": 2},
    "tree": {"exit_layer": 1, "num_speculations": 2, "tree_width": 2, "tree_children": 2},
}


@needs_compiler
@pytest.mark.parametrize("way", WAYS)
def test_up_to_the_models_last_position(way):
    """A compiled draft is whole, so its last tokens lie behind it."""
    model = layerskip_decoder(make_tiny())
    prompt = list(range(1, 97)) + list(range(1, 13))
    generation = run(model, [prompt], 20, speculation=Speculation(**WAYS[way]) if WAYS[way] else None)
    assert model.max_seq_len == len(prompt) + 20
    assert generation.generated == [plain(model, tuple(prompt), 20)] and not model.compiled_steps.failed


@needs_compiler
@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_and_nothing_compiled_twice(small, way):
    """Greedy, against decoding from scratch; other prompts, lengths, limits and stop tokens use the same graphs.

    Also where the first text begins at the end of its cache: that length is not taken for the only one.
    """
    graphs, seconds, accepted = None, small.compiled_steps.seconds if hasattr(small, "compiled_steps") else 0.0, 0
    for prompts, count in ((END, 30), (SHORT, 9), (LONG, 12), (SHORT[::-1], 2), (SHORT, 70)):
        speculation = Speculation(**WAYS[way]) if WAYS[way] else None
        expected = [plain(small, prompt, count) for prompt in prompts]
        generation = run(small, prompts, count, speculation=speculation)
        assert generation.generated == expected
        eager = run(small, prompts, count, speculation=speculation, compile=False)
        for name in ("tokens", "rounds", "drafted", "accepted", "accepted_histogram", "arms"):
            assert getattr(generation.stats, name) == getattr(eager.stats, name)
        if graphs is None:
            graphs = dict(small.compiled_steps.graphs)
            assert generation.stats.compile_s == pytest.approx(small.compiled_steps.seconds - seconds)
            assert generation.stats.compile_s > 0.01 and eager.stats.compile_s == 0
        else:
            assert small.compiled_steps.graphs == graphs
            assert generation.stats.compile_s == 0
        # Compilation counts in compile_s only.
        assert generation.stats.decode_s < max(generation.stats.compile_s, 30)
        accepted += generation.stats.accepted
    assert not small.compiled_steps.failed
    assert (accepted > 0) == (way != "plain")
    stop = expected[0][40]
    generation = run(small, SHORT, 70, speculation=speculation, stop_tokens=[stop])
    assert generation.generated == [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    assert small.compiled_steps.graphs == graphs


@needs_compiler
def test_sampled_and_penalised_steps(small):
    """With the same draws: up to where the eager draft gets shorter, since nothing is needed behind the limit.

    Another draft vocabulary of the same size needs no graph of its own, nor do other settings.
    """
    count, d, graphs, accepted = 24, 2, None, []
    settings = ((1.2, 0.95, 0.01, 1.2), (0.7, 0.8, 0.1, 1.5), (1.9, 0.99, 0.02, 0.9))
    vocabularies = (range(0, 20), range(11, 31), [3, *range(12, 31)])
    for seed, vocabulary, (temperature, top_p, min_p, penalty) in zip((1, 2, 2), vocabularies, settings, strict=True):
        outputs = []
        for compile in (True, False):
            generator = torch.Generator().manual_seed(seed)
            sampler = Sampler(temperature, 20, top_p, min_p, penalty, generator)
            speculation = Speculation(1, d, draft_vocabulary=vocabulary)
            generation = run(small, [LONG[0]], count, sampler=sampler, speculation=speculation, compile=compile)
            outputs.append(generation.generated[0])
            assert len(outputs[-1]) == count
            accepted.append(generation.stats.accepted)
        assert outputs[0][: count - d] == outputs[1][: count - d]
        graphs = graphs or dict(small.compiled_steps.graphs)
        assert small.compiled_steps.graphs == graphs
    assert min(accepted) > 0 and len(set(accepted)) > 1 and not small.compiled_steps.failed


@needs_compiler
def test_graphs_read_the_weights_of_their_call(small):
    speculation = Speculation(**WAYS["chain"])
    before = run(small, SHORT, 9, speculation=speculation)
    graphs, weights = dict(small.compiled_steps.graphs), {k: v.clone() for k, v in small.state_dict().items()}
    try:
        with torch.no_grad():
            small.layers[0].mlp.w2.weight.mul_(-0.7)
            small.tok_embeddings.weight[:5] += 0.3
        plain.cache_clear()
        after = run(small, SHORT, 9, speculation=speculation)
        assert after.generated == [plain(small, prompt, 9) for prompt in SHORT] != before.generated
        assert small.compiled_steps.graphs == graphs
    finally:
        small.load_state_dict(weights)
        plain.cache_clear()


def test_another_precision_has_graphs_and_caches_of_its_own():
    model = make_small()
    steps = compiled_steps(model, CPU)
    assert compiled_steps(model, CPU) is steps
    model.layers[0].attn.q_proj.to(torch.float64)  # as a quantisation changes some of the weights
    assert compiled_steps(model, CPU) is not steps


@needs_compiler
@pytest.mark.parametrize("k", [16, 48, 576, 2064, 9232])  # the last two are multiplied in pieces
@pytest.mark.parametrize("n", [1, 5, 64, 130])
@pytest.mark.parametrize("int8", [False, True])
def test_products_of_few_rows(n, k, int8):
    """x W^T, of several W side by side, and each row of it to the last bit what it is alone."""
    load_kernel()
    generator = torch.Generator().manual_seed(n * k)
    x, w = torch.randn(21, k, generator=generator), torch.randn(n, k, generator=generator)
    w = (60 * w).clamp(-128, 127).to(torch.int8) if int8 else w
    alone = torch.cat([torch.ops.layerskip.linear(row[None], w) for row in x])
    atol = (6e-3 if int8 else 1e-4) * max(1, k / 576)
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


@needs_compiler
def test_which_products_of_a_graph_are_of_few_rows():
    """Those of 1 .. MOST_ROWS rows of whole vectors with a weight as it is stored, in fp32 or int8, with a bias or
    without."""
    load_kernel()
    x, w, bias = torch.randn(7, 16), torch.randn(5, 16), torch.randn(5)
    int8 = torch.arange(-40, 40, dtype=torch.int8).view(5, 16)
    cases = {
        "linear": (lambda x, w, b: x @ w.T, (x, w, bias), True),
        "bias": (lambda x, w, b: torch.addmm(b, x, w.T), (x, w, bias), True),
        "two of the same x": (lambda x, v, w: (x @ w.T).sum(1) * (x @ v.T).sum(1), (x, w, torch.randn(4, 16)), True),
        "int8": (lambda x, w, b: x @ w.to(x.dtype).T * b, (x, int8, bias), True),
        "int8 and a bias": (lambda x, w, b: torch.addmm(b, x, w.T.to(x.dtype)), (x, int8, bias), True),
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
        torch.testing.assert_close(graph(*inputs), function(*inputs), msg=lambda text, case=case: f"{case}: {text}")


@needs_compiler
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 drops the option of torch.compile")
def test_compiled_steps_use_products_of_few_rows(small):
    """Each round all seven of a layer, of which q, k and v are one, and gate and up; and the head: two drafts through a
    layer, and all drafts through both."""
    speculation = Speculation(**WAYS["chain"])
    run(small, SHORT, 9, speculation=speculation)
    generation = Generation(small, SHORT, 9, compile=True, speculation=speculation)
    with torch.profiler.profile() as profile:
        rounds = len(list(generation)) - 1  # the first is the prefill
    calls = Counter(event.name for event in profile.events())
    layers = 2 * 1 + 2
    assert calls["layerskip::linear"] == rounds * (2 * layers + 2 + 1) > 0
    assert calls["layerskip::linear2"] == calls["layerskip::linear3"] == rounds * layers


@needs_compiler
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 drops the option of torch.compile")
@pytest.mark.parametrize("version", [1, 2], ids="torchao's version {}".format)
def test_a_quantised_draft_multiplies_int8_as_it_is_stored(small, version):
    """The layer and the head that draft: no product of a whole matrix in fp32 is left, and the text is the model's."""
    quantizer = {"_component_": "torchao.quantization.Int8WeightOnlyConfig", "version": version}
    drafter = quantised_drafter(small, 1, OmegaConf.create(quantizer))
    speculation = Speculation(1, 2, drafter=drafter)
    expected = [plain(small, prompt, 12) for prompt in SHORT]
    run(small, SHORT, 12, speculation=speculation)
    generation = Generation(small, SHORT, 12, compile=True, speculation=speculation)
    with torch.profiler.profile() as profile:
        rounds = len(list(generation)) - 1
    assert generation.generated == expected
    calls = Counter(event.name for event in profile.events())
    layers = 2 * 1 + 2  # verification runs both layers itself
    assert calls["layerskip::linear"] == rounds * (2 * layers + 2 + 1) > 0
    assert calls["layerskip::linear2"] == calls["layerskip::linear3"] == rounds * layers


def test_a_quantised_draft_has_no_tables_of_its_own(small):
    """That of the positions is as long as the context; the model's weights stay as they are."""
    before = {name: value.clone() for name, value in small.state_dict().items()}
    quantizer = OmegaConf.create({"_component_": "torchao.quantization.Int8WeightOnlyConfig"})
    drafter = quantised_drafter(small, 2, quantizer)
    for layer, source in zip(drafter.layers, small.layers, strict=True):
        assert layer.attn.pos_embeddings is source.attn.pos_embeddings
        assert layer.attn.q_proj is not source.attn.q_proj and type(layer.attn.q_proj.weight) is not torch.nn.Parameter
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@needs_compiler
def test_a_draft_that_stops_early_is_compiled_step_by_step(small):
    """Each length that is verified has a graph of its own."""
    lengths = Counter()
    generation = Generation(
        small,
        [LONG[0]],
        30,
        compile=True,
        speculation=Speculation(1, 2, threshold=0.45),
        on_draft=lambda tokens: lengths.update([len(tokens[0])]),
    )
    for _ in generation:
        pass
    assert generation.generated == [plain(small, LONG[0], 30)]
    assert set(lengths) == {1, 2} and min(lengths.values()) > 2
    assert 0 < generation.stats.acceptance_rate < 1 and not small.compiled_steps.failed


@needs_compiler
def test_a_conversation_goes_on_from_the_cache_of_compiled_steps(small):
    """The cache of one call is that of the next one; a call in between that takes it over is noticed."""
    speculation = Speculation(**WAYS["chain"])
    first = run(small, SHORT, 9, speculation=speculation)
    prompts = [(*prompt, *tokens, 4) for prompt, tokens in zip(SHORT, first.generated, strict=True)]
    again = run(small, prompts, 9, speculation=speculation, cache=first.cache)
    assert again.cache is first.cache and again.stats.compile_s == 0
    assert again.stats.reused_tokens == 2 * min(len(prompt) - 2 for prompt in prompts)
    assert again.generated == [plain(small, prompt, 9) for prompt in prompts]
    run(small, LONG, 3, speculation=speculation)
    last = run(small, prompts, 9, speculation=speculation, cache=first.cache)
    assert last.stats.reused_tokens == 0 and last.generated == again.generated


SECOND_RUN = """
import sys
sys.path.insert(0, {tests!r})
from torch._dynamo.utils import counters
import test_compile as t
t.torch.set_float32_matmul_precision("highest")  # as conftest.py: it is part of what compiled code is found by
model = t.make_small()
for prompts, count in ((t.END, 30), (t.SHORT, 9)):
    generation = t.run(model, prompts, count, speculation=t.Speculation(**t.WAYS["chain"]))
assert not model.compiled_steps.failed
found = counters["inductor"]
print(generation.generated, len(model.compiled_steps.graphs), found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
"""


@needs_compiler
def test_a_second_run_finds_the_compiled_code(small):
    """In another process, by torch's own counts; this one has compiled the same graphs."""
    speculation = Speculation(**WAYS["chain"])
    run(small, END, 30, speculation=speculation)
    tokens = run(small, SHORT, 9, speculation=speculation).generated
    program = SECOND_RUN.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    again, graphs, hits, misses = done.stdout.rsplit(maxsplit=3)
    assert again == str(tokens)
    assert int(hits) == int(graphs) >= 2 and int(misses) == 0


def test_what_was_compiled_in_a_round_teaches_nothing(not_compiled):
    """Neither which way is fast nor how long a draft step takes: rounds that compiled are left out; so are those that
    the limit cuts."""
    model, speculation = make_small(), Speculation([1, 2], 2, threshold="auto")
    compiled, cut, room, learnt = [], [], 60, []
    policy = speculation.policy
    learn, policy.chooser.learn = policy.chooser.learn, lambda *args: (learnt.append(args), learn(*args))
    generation = Generation(model, [LONG[0]], 60, compile=True, speculation=speculation)
    before = 0.0
    for (new,) in generation:
        compiled.append(generation.compile_s > before)
        cut.append(room <= 2)
        before, room = generation.compile_s, room - len(new)
    assert sum(compiled[1:]) >= 4
    assert len(learnt) == sum(not (slow or short) for slow, short in zip(compiled[1:], cut[1:], strict=True))
    assert all(seconds > 0 for _, _, seconds in learnt)


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nand more"), AssertionError()], ids=["message", "none"])
def test_where_nothing_can_be_compiled_eager_steps_run(error, monkeypatch):
    """One line says so, once; the tokens are right, and later calls do not try again."""
    model, warnings, tries = make_small(), [], []

    def failing(*_):
        tries.append(1)
        raise error

    monkeypatch.setattr(torch, "compile", lambda *_, **__: failing)
    monkeypatch.setattr(compiling.log, "warning", lambda message, *args: warnings.append(message % args))
    for way in ("chain", "tree", "plain"):
        out = generate(model, [torch.tensor(prompt) for prompt in SHORT], 9, compile=True, **WAYS[way])
        expected = [plain(model, prompt, 9) for prompt in SHORT]
        assert [row[-9:] for row in out.tokens.tolist()] == expected
        assert out.stats.compile_s < 5
    assert len(tries) == 1
    (warning,) = warnings
    assert warning.startswith("compile: ") and "\n" not in warning
    assert "no compiler" in warning or "AssertionError" in warning


@pytest.mark.parametrize("ways", [("plain", "chain", "chain"), ("drafted apart", "plain")])
def test_a_step_that_cannot_be_compiled_is_the_only_one(ways, not_compiled, monkeypatch):
    """As a quantised draft that a backend cannot do, be it the first: others are compiled, and one line names it."""
    model, warnings, compiled = make_small(), [], []

    def made(function, *_):
        def failing(*_):
            raise RuntimeError("no kernel")

        compiled.append(function.__name__)
        return failing if function.__name__ == "draft_chain" else function

    monkeypatch.setattr(compiling, "_compiled", made)
    monkeypatch.setattr(compiling.log, "warning", lambda message, *args: warnings.append(message % args))
    apart = {"drafted apart": WAYS["chain"] | {"drafter": make_small()}}
    for way in ways:
        arguments = (WAYS | apart)[way]
        generation = run(model, SHORT, 9, speculation=Speculation(**arguments) if arguments else None)
        assert generation.generated == [plain(model, prompt, 9) for prompt in SHORT]
    steps = model.compiled_steps
    assert not steps.failed and set(steps.refused.values()) == {"draft_chain"}
    assert sorted(compiled) == ["draft_chain", "plain_logits", "verify_greedily"]
    assert warnings == ["compile: not possible for draft_chain, going on without (no kernel)"]


def test_graphs_of_two_models_have_no_shapes_in_common(monkeypatch):
    """Under one name dynamo takes what differs between them for dynamic; then there are no products of few rows."""
    names = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: names.append(function.__code__.co_name) or function)
    for rows in (1, 2):
        run(make_small(), SHORT[:rows], 3)
    assert len(names) == len(set(names)) == 2


def test_rounds_that_compile_count_as_the_others_on_the_mean(not_compiled):
    generation = Generation(make_small(), SHORT[:1], 9, speculation=Speculation(1, 2), compile=True)
    clock, after = generation.clock, []
    for _ in generation:
        after.append((generation.stats.decode_s, generation.stats.compile_s, sum(clock.seconds.values())))
    rounds = len(after) - 1  # the first is the prefill
    timed = sum(one[1] == before[1] for before, one in pairwise(after))
    assert timed == rounds - 1 > 0 and after[1][0] == after[1][2] == 0 < after[1][1]
    stats = generation.stats
    assert stats.decode_s == pytest.approx(after[-1][0] * rounds / timed)
    assert stats.draft_s + stats.verify_s == pytest.approx(after[-1][2] * rounds / timed)
    assert stats.draft_s + stats.verify_s + stats.accept_s == pytest.approx(stats.decode_s)


def test_where_each_round_compiles_the_rest_of_their_time_counts(not_compiled, monkeypatch):
    """Else there would be tokens without a time."""
    keep = Generation._keep
    monkeypatch.setattr(Generation, "_keep", lambda *args: (time.sleep(0.05), keep(*args))[1])
    generation = Generation(make_small(), SHORT[:1], 2, speculation=Speculation(1, 2), compile=True)
    started = time.perf_counter()
    for _ in generation:
        pass
    stats = generation.stats
    assert stats.rounds == 1 and stats.compile_s > 0
    assert 0.05 <= stats.decode_s < time.perf_counter() - started - stats.compile_s
    assert stats.draft_s == stats.verify_s == 0 and stats.tokens_per_second > 0


def test_a_path_with_a_new_step_is_captured_in_the_next_round(not_compiled, monkeypatch):
    """CUDA graphs: where one step of a round runs for the first time, none after it is captured."""
    for name in ("cuda.synchronize", "compiler.cudagraph_mark_step_begin"):
        monkeypatch.setattr(f"torch.{name}", lambda *_: None)

    class Two:
        def old(self):
            pass

        new = old

    steps, two = CompiledSteps(torch.device("cuda")), Two()
    captured = []
    for names in (("old",), ("old",), ("new", "old"), ("new", "old"), ("new", "old")):
        steps.begin_round()
        for name in names:
            steps(name, getattr(two, name), None)
        captured.append(steps.captured.copy())
    alone, both = {("old",)}, {("old",), ("new",), ("new", "old")}
    assert captured == [set(), alone, alone, both, both]


def test_a_cache_serves_while_it_is_large_enough():
    model, steps = make_small(), CompiledSteps(CPU)
    cache = steps.cache(model, 2, 256)
    cache.tokens = [[1], [2]]
    assert steps.cache(model, 2, 100) is cache and cache.tokens == [[], []]
    assert steps.cache(model, 3, 100) is not cache
    on_gpu = CompiledSteps(torch.device("cuda"))
    on_gpu._caches = dict.fromkeys(range(1, 6), cache)
    assert on_gpu.cache(model, 1, 100) is cache and len(on_gpu._caches) == 5  # CUDA graphs know where each is
    on_gpu._caches = dict.fromkeys(range(1, 20), cache)
    assert on_gpu.cache(model, 2, 100) is cache and [*on_gpu._caches] == [*range(13, 20), 2]
    larger = steps.cache(model, 3, 300)
    assert larger.max_len == 300 and steps.cache(model, 3, 257) is larger


def test_lengths_that_few_graphs_serve():
    assert [rounded(length, CPU) for length in (1, 64, 65, 200, 4000)] == [64, 64, 128, 256, 4032]
    gpu = torch.device("cuda")
    assert [rounded(length, gpu) for length in (1, 256, 257, 512, 1000, 4097)] == [256, 256, 512, 512, 1024, 8192]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_cuda_graphs(way):
    """Greedy in fp32, a batch of two, each call's rounds on the same graphs; the reference runs on the CPU."""
    model, reference = make_small().cuda(), make_small()
    graphs = None
    for prompts, count in ((SHORT, 40), (LONG, 25), (SHORT, 7)):
        speculation = Speculation(**WAYS[way]) if WAYS[way] else None
        generation = run(model, prompts, count, speculation=speculation)
        assert generation.generated == [plain(reference, prompt, count) for prompt in prompts]
        assert not model.compiled_steps.failed
        graphs = graphs or dict(model.compiled_steps.graphs)
        assert model.compiled_steps.graphs == graphs
        assert way == "plain" or generation.stats.draft_s > 0
    assert generation.stats.compile_s == 0


OTHER_WAYS = WAYS | {
    "looked up": {"exit_layer": 1, "num_speculations": 3, "prompt_lookup": 2},
    "as long as it is sure": {"exit_layer": 1, "num_speculations": 4, "threshold": "auto"},
    "exits": {"exit_layer": [1, 2], "num_speculations": 2},
    "of some tokens": {"exit_layer": 1, "num_speculations": 2, "draft_vocabulary": tuple(range(0, VOCAB, 2))},
}
LONGER = [tuple((3 * i + i // 7) % VOCAB for i in range(240))]  # its text outgrows the first length of the graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_cuda_graphs_of_one_row_and_other_lengths(way, dtype):
    """One row, whose products and writes are other kernels, and a text that needs longer graphs on the way; in fp32
    the tokens of the CPU."""
    model, reference = make_small().to("cuda", dtype), make_small()
    for prompts, count in ((SHORT[:1], 40), (LONGER, 60), (LONGER, 60)):
        speculation = Speculation(**OTHER_WAYS[way]) if OTHER_WAYS[way] else None
        generation = run(model, prompts, count, speculation=speculation)
        assert len(generation.generated[0]) == count and not model.compiled_steps.refused
        if dtype == torch.float32:
            assert generation.generated == [plain(reference, prompt, count) for prompt in prompts]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_of_a_quantised_draft():
    model, reference = make_small().cuda(), make_small()
    quantizer = OmegaConf.create({"_component_": "torchao.quantization.Int8WeightOnlyConfig"})
    drafter = quantised_drafter(model, 1, quantizer, with_head=True)
    for prompts in (SHORT[:1], SHORT, LONGER):
        generation = run(model, prompts, 30, speculation=Speculation(1, 2, drafter=drafter))
        assert generation.generated == [plain(reference, prompt, 30) for prompt in prompts]
        assert not model.compiled_steps.refused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["chain", "tree"])
def test_cuda_graphs_repeat_by_the_seed(way):
    model, outputs = make_small().cuda(), []
    for seed in (1, 1, 2):
        sampler = Sampler(1.0, top_k=20, rng=torch.Generator("cuda").manual_seed(seed))
        generation = run(model, SHORT, 30, sampler=sampler, speculation=Speculation(**WAYS[way]))
        outputs.append(generation.generated)
    assert outputs[0] == outputs[1] != outputs[2] and not model.compiled_steps.failed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_the_host_waits_once_in_a_round_on_a_gpu(way):
    """By torch's own count of calls that wait for the device."""
    model, speculation = make_small().cuda(), Speculation(**WAYS[way]) if WAYS[way] else None
    for _ in range(2):  # captures
        run(model, SHORT, 20, speculation=speculation)
    generation = Generation(model, SHORT, 20, compile=True, speculation=speculation)
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
