"""Compiled steps give what eager ones give; what is compiled serves later calls; without a compiler eager ones run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.compiled import END, LONG, MAX_LEN, SHORT, WAYS, compiled_steps, compiles, make_small, run
from helpers.speculation import plain
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from layerskip_recipes.generation import backends
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels import compiling, cpp_decoder
from layerskip_recipes.generation.sampling import Sampler


@pytest.fixture(scope="module")
def small():
    """One model for all tests: its graphs stay with it."""
    return make_small(MAX_LEN)


@compiles
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_eager_steps_and_nothing_is_compiled_twice(way, small, request):
    """Greedy, by inductor for chains, against decoding from scratch; other prompts, limits and stop tokens use the same
    graphs. Where the first text begins at the end of its cache, that length is not taken for the only one. Up to the
    model's last position, which a compiled draft passes, as it is whole.
    """
    if way == "plain":
        request.getfixturevalue("traced")
    graphs, seconds, accepted = None, compiled_steps(small).seconds, 0
    to_the_end = [([row[cut:] for row in END], MAX_LEN - len(END[0]) + cut) for cut in range(3)]
    for prompts, count in (*to_the_end, (SHORT, 9), (LONG, 12), (SHORT[::-1], 2), (SHORT, 70)):
        expected = [plain(small, prompt, count) for prompt in prompts]
        generation = run(small, prompts, count, speculation=WAYS[way])
        assert generation.generated == expected
        eager = run(small, prompts, count, speculation=WAYS[way], compile=False)
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
    generation = run(small, SHORT, 70, speculation=WAYS[way], stop_tokens=[stop])
    assert generation.generated == [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    assert compiled_steps(small).graphs == graphs


@compiles
def test_sampling_settings_need_no_graphs_of_their_own(small, traced):
    """The tokens of eager steps. Another draft vocabulary of the same size needs no graph of its own, nor do other
    settings."""
    count, d, graphs, accepted = 24, 2, None, []
    settings = ((1.2, 0.95, 0.01, 1.2), (0.7, 0.8, 0.1, 1.5), (1.9, 0.99, 0.02, 0.9))
    vocabularies = (range(0, 20), range(11, 31), [3, *range(12, 31)])
    for seed, vocabulary, (temperature, top_p, min_p, penalty) in zip((1, 2, 2), vocabularies, settings, strict=True):
        outputs = []
        for compile in (True, False):
            sampler = Sampler(temperature, 20, top_p, min_p, penalty, seed)
            speculation = Speculation(1, d, draft_vocabulary=vocabulary)
            generation = run(small, [LONG[0]], count, sampler=sampler, speculation=speculation, compile=compile)
            outputs.append(generation.generated[0])
            assert len(outputs[-1]) == count
            accepted.append(generation.stats.accepted)
        assert outputs[0] == outputs[1]
        graphs = graphs or dict(compiled_steps(small).graphs)
        assert compiled_steps(small).graphs == graphs
    assert min(accepted) > 0 and len(set(accepted)) > 1 and not compiled_steps(small).failed


@compiles
def test_graphs_read_the_weights_of_their_call(small):
    before = run(small, SHORT, 9, speculation=WAYS["chain"])
    graphs, weights = dict(compiled_steps(small).graphs), {k: v.clone() for k, v in small.state_dict().items()}
    try:
        with torch.no_grad():
            small.layers[0].mlp.w2.weight.mul_(-0.7)
            small.tok_embeddings.weight[:5] += 0.3
        plain.cache_clear()
        after = run(small, SHORT, 9, speculation=WAYS["chain"])
        assert after.generated == [plain(small, prompt, 9) for prompt in SHORT] != before.generated
        # Another tensor in a weight's place.
        small.layers[1].mlp.w1.weight = torch.nn.Parameter(-small.layers[1].mlp.w1.weight.detach())
        plain.cache_clear()
        other = run(small, SHORT, 9, speculation=WAYS["chain"])
        assert other.generated == [plain(small, prompt, 9) for prompt in SHORT] != after.generated
        assert compiled_steps(small).graphs == graphs
    finally:
        small.load_state_dict(weights)
        plain.cache_clear()


@compiles
def test_a_call_that_takes_over_the_cache_of_compiled_steps_is_noticed(small):
    """The cache of one call is that of the next one; test_cache_reuse.py goes on from it."""
    first = run(small, SHORT, 9, speculation=WAYS["chain"])
    prompts = [(*prompt, *tokens, 4) for prompt, tokens in zip(SHORT, first.generated, strict=True)]
    run(small, LONG, 3, speculation=WAYS["chain"])
    last = run(small, prompts, 9, speculation=WAYS["chain"], cache=first.cache)
    assert last.cache is first.cache and last.stats.reused_tokens == 0
    assert last.generated == [plain(small, prompt, 9) for prompt in prompts]


SECOND_RUN = """
import sys
sys.path.insert(0, {tests!r})
import test_compile as t
model = t.make_small(width=32)
generation = t.run(model, t.SHORT, 9, speculation=t.WAYS["chain"])
assert isinstance(generation.context.backend, t.backends.CppBackend)
print(generation.generated)
"""


@compiles
def test_a_second_run_finds_the_compiled_code(tmp_path):
    tokens = run(make_small(width=32), SHORT, 9, speculation=WAYS["chain"]).generated
    folder = Path(torch._inductor.runtime.cache_dir_utils.cache_dir())
    before = {*folder.rglob("*.so")}
    assert before
    code = SECOND_RUN.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(tokens) and {*folder.rglob("*.so")} == before


@pytest.mark.parametrize("chosen", [None, default_cache_dir(), "elsewhere"], ids=["unset", "set by torch", "set"])
def test_inductor_keeps_its_graphs_in_the_users_folder(chosen, monkeypatch, tmp_path):
    """Unless the user has chosen a folder."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", chosen or "")
    if chosen is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    cpp_decoder._library_folder.cache_clear()
    run(make_small(), SHORT, 9, speculation=WAYS["chain"])
    cpp_decoder._library_folder.cache_clear()
    folder = chosen if chosen == "elsewhere" else str(tmp_path / "layerskip_recipes" / "inductor")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == folder


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("ways", [("plain", "chain", "chain"), ("drafted apart", "plain")])
def test_a_step_that_cannot_be_compiled_is_the_only_one(ways, monkeypatch, caplog):
    """As a quantised draft that a backend cannot do, be it the first: others are compiled, and one line names it."""
    model, compiled = make_small(), []

    def made(function, *_):
        def failing(*_):
            raise RuntimeError("no kernel")

        compiled.append(function.__name__)
        return failing if function.__name__ == "draft_token" else function

    monkeypatch.setattr(compiling, "_compiled", made)
    draft_decoder, packed = make_small(), type("Packed", (torch.nn.Parameter,), {})
    draft_decoder.norm.scale = packed(draft_decoder.norm.scale.data)
    for way in ways:
        draft_weights = (draft_decoder, None) if way == "drafted apart" else None
        speculation = WAYS["plain" if way == "plain" else "chain"]
        generation = run(model, SHORT, 9, speculation=speculation, draft_weights=draft_weights)
        assert generation.generated == [plain(model, prompt, 9) for prompt in SHORT]
    steps = compiled_steps(model)
    assert not steps.failed and set(steps.refused.values()) == {"draft_token"}
    assert {*compiled} == {"draft_token", "next_logits", "draft_logits", "accept_tokens"}
    assert compiled.count("draft_token") == 1
    assert warned(caplog) == ["compile: not possible for draft_token, going on without (no kernel)"]


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nand more"), AssertionError()], ids=["message", "none"])
@pytest.mark.parametrize("width", [16, 32], ids=["graphs", "C++"])
def test_without_a_compiler_steps_run_as_they_are(width, error, monkeypatch, caplog):
    """One line says so, once; the tokens are right, and later calls do not try again."""
    model, tries = make_small(width=width), []

    def failing(*_):
        tries.append(1)
        raise error

    monkeypatch.setattr(torch, "compile", lambda *_, **__: failing)
    monkeypatch.setattr(backends, "load_library", failing)
    sure = Speculation(2, 4, min_confidence=1.0)  # ends each draft after one token
    for way in (WAYS["chain"], WAYS["plain"], sure):
        drafted = []
        generation = run(model, SHORT, 9, speculation=way, on_draft=drafted.append)
        assert generation.generated == [plain(model, prompt, 9) for prompt in SHORT]
        assert generation.stats.compile_s < 5
    assert {len(row) for rows in drafted for row in rows} <= {0, 1}
    assert len(tries) == 1
    (warning,) = warned(caplog)
    assert "\n" not in warning
    assert "no compiler" in warning or "AssertionError" in warning


@pytest.mark.slow
def test_rounds_that_compile_teach_the_rule_nothing(traced):
    """The seconds of rounds that compiled are unknown; rounds that the limit cuts are left out."""
    rule, learnt, speculation = DraftRule(), [], Speculation(1, 2, prompt_lookup=1)
    learn, rule.learn = rule.learn, lambda *args: (learnt.append(args), learn(*args))
    generation = Generation(make_small(), [LONG[0]], 60, compile=True, speculation=speculation, rule=rule)
    rounds, before, room = [], 0.0, 60
    for (new,) in generation:
        rounds.append((generation.context.compile_s > before, room <= 2))  # compiled, cut
        before, room = generation.context.compile_s, room - len(new)
    del rounds[0]
    assert sum(compiled for compiled, _ in rounds) >= 2
    assert [seconds > 0 for _, _, seconds in learnt] == [not compiled for compiled, cut in rounds if not cut]
