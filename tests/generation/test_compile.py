"""Compiled steps give what eager ones give; what is compiled serves later calls; without a compiler eager ones run."""

import os
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import forks
from helpers.compiled import CPU, END, LONG, MAX_LEN, SHORT, WAYS, compiles, make_small, run
from helpers.speculation import plain

from layerskip_recipes.config.components import Component
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.choice import DiscountedUCB
from layerskip_recipes.generation.drafting.section import quantised_drafter
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels import compiling
from layerskip_recipes.generation.kernels.compiling import CompiledSteps, compiled_steps, rounded_length
from layerskip_recipes.generation.sampling import Sampler


@pytest.fixture(scope="module")
def small():
    """One model for all tests: its graphs stay with it."""
    return make_small(MAX_LEN)


@pytest.fixture
def not_compiled(monkeypatch):
    """Steps are called as they are, and count as compiled all the same."""
    monkeypatch.setattr(compiling, "_compiled", lambda function, *_: function)


@compiles
@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_and_nothing_compiled_twice(way, small):
    """Greedy, against decoding from scratch; other prompts, lengths, limits and stop tokens use the same graphs.

    Also where the first text begins at the end of its cache: that length is not taken for the only one. And up to the
    model's last position, which a compiled draft passes, as it is whole.
    """
    graphs, seconds, accepted = None, compiled_steps(small).seconds, 0
    to_the_end = [([row[cut:] for row in END], MAX_LEN - len(END[0]) + cut) for cut in range(3)]
    for prompts, count in (*to_the_end, (SHORT, 9), (LONG, 12), (SHORT[::-1], 2), (SHORT, 70)):
        speculation = Speculation(**WAYS[way]) if WAYS[way] else None
        expected = [plain(small, prompt, count) for prompt in prompts]
        generation = run(small, prompts, count, speculation=speculation)
        assert generation.generated == expected
        eager = run(small, prompts, count, speculation=speculation, compile=False)
        for name in ("tokens", "rounds", "drafted", "accepted", "accepted_histogram", "rounds_by_kind"):
            assert getattr(generation.stats, name) == getattr(eager.stats, name)
        if graphs is None:
            graphs = dict(compiled_steps(small).graphs)
            assert generation.stats.compile_s == pytest.approx(compiled_steps(small).seconds - seconds)
            assert generation.stats.compile_s > 0.01 and eager.stats.compile_s == 0
        else:
            assert compiled_steps(small).graphs == graphs
            assert generation.stats.compile_s == 0
        # Compilation counts in compile_s only.
        assert generation.stats.decode_s < max(generation.stats.compile_s, 30)
        accepted += generation.stats.accepted
    assert not compiled_steps(small).failed
    assert (accepted > 0) == (way != "plain")
    stop = expected[0][40]
    generation = run(small, SHORT, 70, speculation=speculation, stop_tokens=[stop])
    assert generation.generated == [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    assert compiled_steps(small).graphs == graphs


@compiles
def test_sampled_and_penalised_steps(small, traced):
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
        graphs = graphs or dict(compiled_steps(small).graphs)
        assert compiled_steps(small).graphs == graphs
    assert min(accepted) > 0 and len(set(accepted)) > 1 and not compiled_steps(small).failed


@compiles
def test_graphs_read_the_weights_of_their_call(small):
    speculation = Speculation(**WAYS["chain"])
    before = run(small, SHORT, 9, speculation=speculation)
    graphs, weights = dict(compiled_steps(small).graphs), {k: v.clone() for k, v in small.state_dict().items()}
    try:
        with torch.no_grad():
            small.layers[0].mlp.w2.weight.mul_(-0.7)
            small.tok_embeddings.weight[:5] += 0.3
        plain.cache_clear()
        after = run(small, SHORT, 9, speculation=speculation)
        assert after.generated == [plain(small, prompt, 9) for prompt in SHORT] != before.generated
        # Another tensor in a weight's place.
        small.layers[1].mlp.w1.weight = torch.nn.Parameter(-small.layers[1].mlp.w1.weight.detach())
        plain.cache_clear()
        other = run(small, SHORT, 9, speculation=speculation)
        assert other.generated == [plain(small, prompt, 9) for prompt in SHORT] != after.generated
        assert compiled_steps(small).graphs == graphs
    finally:
        small.load_state_dict(weights)
        plain.cache_clear()


def test_another_precision_has_graphs_and_caches_of_its_own():
    model = make_small()
    steps = compiled_steps(model)
    assert compiled_steps(model) is steps
    model.layers[0].attn.q_proj.to(torch.float64)  # as a quantisation changes some of the weights
    assert compiled_steps(model) is not steps


def test_a_quantised_draft_has_no_tables_of_its_own(small):
    """That of the positions is as long as the context; the model's weights stay as they are."""
    before = {name: value.clone() for name, value in small.state_dict().items()}
    quantizer = Component({"_component_": "torchao.quantization.Int8WeightOnlyConfig"}, "quantizer")
    drafter = quantised_drafter(small, range(2), quantizer)
    for layer, source in zip(drafter.layers, small.layers, strict=True):
        assert layer.attn.pos_embeddings is source.attn.pos_embeddings
        assert layer.attn.q_proj is not source.attn.q_proj and type(layer.attn.q_proj.weight) is not torch.nn.Parameter
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@compiles
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
import test_compile as t
model = t.make_small(width=32)
generation = t.run(model, t.SHORT, 9, speculation=t.Speculation(**t.WAYS["chain"]))
assert generation.context.cpp is not None
print(generation.generated)
"""


@compiles
def test_a_second_run_finds_the_compiled_code(tmp_path):
    """In another process, which writes no library."""
    model, speculation = make_small(width=32), Speculation(**WAYS["chain"])
    tokens = run(model, SHORT, 9, speculation=speculation).generated
    folder = Path(torch._inductor.runtime.cache_dir_utils.cache_dir())
    before = {*folder.rglob("*.so")}
    assert before
    (tmp_path / "second_run.py").write_text(SECOND_RUN.format(tests=str(Path(__file__).parent)))
    (done,) = forks.run([str(tmp_path / "second_run.py")], tmp_path, [os.environ])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(tokens) and {*folder.rglob("*.so")} == before


def test_what_was_compiled_in_a_round_teaches_nothing(not_compiled):
    """Rounds that compiled say nothing about the rate of others; nor do those that the limit cuts."""
    model, choice, learnt = make_small(), DiscountedUCB(), []
    compiled, cut, room = [], [], 60
    learn, choice.learn = choice.learn, lambda *args: (learnt.append(args), learn(*args))
    speculation = Speculation(1, 2, prompt_lookup=1)
    generation = Generation(model, [LONG[0]], 60, compile=True, speculation=speculation, choice=choice)
    before = 0.0
    for (new,) in generation:
        compiled.append(generation.compile_s > before)
        cut.append(room <= 2)
        before, room = generation.compile_s, room - len(new)
    assert sum(compiled[1:]) >= 2
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
    for way in ("chain", "plain"):
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
        return failing if function.__name__ == "draft_token" else function

    monkeypatch.setattr(compiling, "_compiled", made)
    monkeypatch.setattr(compiling.log, "warning", lambda message, *args: warnings.append(message % args))
    drafter, packed = make_small(), type("Packed", (torch.nn.Parameter,), {})
    drafter.norm.scale = packed(drafter.norm.scale.data)
    apart = {"drafted apart": WAYS["chain"] | {"drafter": drafter}}
    for way in ways:
        arguments = (WAYS | apart)[way]
        generation = run(model, SHORT, 9, speculation=Speculation(**arguments) if arguments else None)
        assert generation.generated == [plain(model, prompt, 9) for prompt in SHORT]
    steps = compiled_steps(model)
    assert not steps.failed and set(steps.refused.values()) == {"draft_token"}
    assert compiled.count("draft_token") == 1 and {*compiled} == {"draft_token", "next_logits", "verify_greedily"}
    assert warnings == ["compile: not possible for draft_token, going on without (no kernel)"]


def test_graphs_of_two_models_have_no_shapes_in_common(monkeypatch):
    """Under one name dynamo takes what differs between them for dynamic."""
    names = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: names.append(function.__code__.co_name) or function)
    for rows in (1, 2):
        run(make_small(), SHORT[:rows], 3)
    assert len(names) == len(set(names)) == 2


def test_rounds_that_compile_count_as_the_others_on_the_mean(not_compiled):
    generation = Generation(make_small(), SHORT[:1], 9, speculation=Speculation(1, 2), compile=True)
    phases, after = generation.phases, []
    for _ in generation:
        after.append((generation.stats.decode_s, generation.stats.compile_s, sum(phases.seconds().values())))
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


def test_a_cache_serves_while_it_is_large_enough():
    model, steps = make_small(), CompiledSteps(CPU)
    cache = steps.cache(model, 2, 256)
    cache.tokens = [[1], [2]]
    assert steps.cache(model, 2, 100) is cache and cache.tokens == [[], []]
    assert steps.cache(model, 3, 100) is not cache
    on_gpu = CompiledSteps(torch.device("cuda"))
    on_gpu._caches = dict.fromkeys(((rows, 0) for rows in range(1, 6)), cache)
    assert on_gpu.cache(model, 1, 100) is cache and len(on_gpu._caches) == 5  # CUDA graphs know where each is
    on_gpu._caches = dict.fromkeys(((rows, 0) for rows in range(1, 20)), cache)
    assert on_gpu.cache(model, 2, 100) is cache and [rows for rows, _ in on_gpu._caches] == [*range(13, 20), 2]
    larger = steps.cache(model, 3, 300)
    assert larger.max_len == 300 and steps.cache(model, 3, 257) is larger


def test_lengths_that_few_graphs_serve():
    assert [rounded_length(length, CPU) for length in (1, 64, 65, 200, 4000)] == [64, 64, 128, 256, 4032]
    lengths = {1: 256, 256: 256, 257: 512, 512: 512, 1000: 1024, 4097: 8192}
    assert {length: rounded_length(length, torch.device("cuda")) for length in lengths} == lengths
