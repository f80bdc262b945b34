"""The generate and eval recipes: prompts, stops, streaming, the comparison, the report, and the exits' measurement."""

import importlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization
from helpers.commands import run_tune
from helpers.configs import MODEL, benchmark_config, eval_config, generate_config, make_checkpoint, write_yaml
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.data import Message
from torchtune.generation import generate as torchtune_generate
from torchtune.utils import get_logger

from layerskip_recipes import generate
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.cli.run import is_for_all
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.evaluation.recipe import LayerSkipEval
from layerskip_recipes.generation.config import check_config
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.prompts import to_tokens
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.generation.report import Totals
from layerskip_recipes.generation.speculation_section import weight_bytes
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.text_stream import TextStream, follow

CPU = torch.device("cpu")
MODES = {
    "autoregressive": ["self_speculation=null"],
    "early exit": ["self_speculation=null", "exit_layer=3"],
    "self-speculative": [],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "folder", tokenizer_folder)


def run(path: Path, *overrides: str) -> tuple[LayerSkipGenerate, dict]:
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    return recipe, recipe.generate()


@pytest.fixture
def path(tmp_path, checkpoint) -> Path:
    return generate_config(tmp_path, checkpoint, max_new_tokens=24)


def test_greedy_output_is_torchtunes(path, capsys):
    """The text on stdout is that of `torchtune.generation.generate`, and the last line is the report."""
    recipe, report = run(path, "benchmark.compare=true")
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == report
    expected, _ = torchtune_generate(
        recipe.model,
        torch.tensor(recipe.prompt_tokens[0]),
        max_generated_tokens=24,
        top_k=1,
        stop_tokens=recipe.stop_tokens,
    )
    expected = expected[0, len(recipe.prompt_tokens[0]) :].tolist()
    assert report["tokens"] == report["baseline_tokens"] == len(expected)
    assert report["identical"] is True and report["speedup"] > 0
    text = recipe.tokenizer.decode([token for token in expected if token not in recipe.stop_tokens])
    assert text.strip() and f">>> {text}\n" in out


def test_the_report_adds_up(path):
    _, report = run(path, "prompt=[import os, class A, x = 1]")
    assert report["prompts"] == 3
    assert report["acceptance_rate"] == report["accepted"] / report["drafted"]
    assert sum(report["accepted_histogram"]) == report["rounds"]
    assert sum(k * n for k, n in enumerate(report["accepted_histogram"])) == report["accepted"]
    # Each round gives its accepted tokens and one more; each prompt's first token comes from the prefill.
    assert report["tokens"] == report["accepted"] + report["rounds"] + 3
    assert report["peak_memory_bytes"] > 1e7 and report["prefill_s"] > 0 and report["decode_s"] > 0


def test_early_exit_takes_all_tokens_from_that_exit(path):
    """Chosen one by one from exit 3 of the whole text, without a cache."""
    recipe, report = run(path, *MODES["early exit"], f"output_file={path.parent / 'out.jsonl'}")
    tokens = list(recipe.prompt_tokens[0])
    with torch.no_grad():
        for _ in range(24):
            tokens.append(recipe.model(torch.tensor([tokens]), exit_layer=3)[0, -1].argmax().item())
            if tokens[-1] in recipe.stop_tokens:
                break
    (line,) = (path.parent / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == recipe.text_of(0).text(tokens[len(recipe.prompt_tokens[0]) :])
    assert report["tokens"] == len(tokens) - len(recipe.prompt_tokens[0])
    assert report["acceptance_rate"] is None and report["drafted"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_seeds_make_sampling_reproducible(path, mode, capsys):
    texts = []
    for seed in (1, 1, 2):
        run(path, *MODES[mode], "temperature=0.9", "top_k=40", "top_p=0.95", f"seed={seed}")
        texts.append(capsys.readouterr().out.split("\n---")[1])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_stop_strings_end_the_text_before_them_in_every_mode(path, capsys, stream):
    recipe, _ = run(path, "self_speculation=null", "stream=false")
    stream_of = TextStream(recipe.tokenizer, recipe.stop_tokens)
    whole = stream_of.text(generate(recipe.model, torch.tensor(recipe.prompt_tokens[0]), 24).tokens[0].tolist())
    whole = whole[len("def main(") :]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    expected = whole[: whole.index(stop)]
    counts = []
    for mode in ("autoregressive", "self-speculative"):
        capsys.readouterr()
        _, report = run(path, *MODES[mode], f"stop_strings=[{json.dumps(stop)}]", f"stream={stream}")
        shown = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
        assert shown == expected
        counts.append(report["tokens"])
    assert counts[0] == counts[1] < 24


def test_stop_tokens_are_the_tokenizers_and_the_configs(path):
    recipe, report = run(path)
    output = (
        generate(recipe.model, torch.tensor(recipe.prompt_tokens[0]), 24)
        .tokens[0, len(recipe.prompt_tokens[0]) :]
        .tolist()
    )
    stop = output[7]
    _, stopped = run(path, f"stop_tokens=[{stop}]", "benchmark.compare=true")
    assert stopped["tokens"] == output.index(stop) + 1 < report["tokens"]
    assert stopped["identical"] is True


def test_batches_give_what_each_prompt_gives_alone_in_input_order(path, tmp_path, capsys):
    """Prompts of very different lengths, so that batches mix and reorder them; answers come back in their order."""
    texts = [
        "x = 1\n" * 6,
        "def f(",
        "import os\nimport sys\n" * 3,
        "class A:",
        "a",
        "for i in range(10):\n    print(i)",
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    overrides = [f"prompt_file={file}", "max_new_tokens=12", "benchmark.compare=true"]
    answers = []
    for size in (1, 2, 4):
        out = tmp_path / f"{size}.jsonl"
        _, report = run(path, *overrides, f"batch_size={size}", f"output_file={out}")
        assert report["identical"] is True and report["prompts"] == 6
        answers.append([json.loads(line) for line in out.read_text().splitlines()])
        shown = capsys.readouterr().out
        assert [shown.index(f"--- prompt {i + 1} of 6") for i in range(6)] == sorted(
            shown.index(f"--- prompt {i + 1} of 6") for i in range(6)
        )
        assert [line["prompt"] for line in answers[-1]] == texts
        assert all(line["text"] in shown for line in answers[-1])
    assert answers[0] == answers[1] == answers[2]


def test_a_stop_string_ends_its_row_of_a_batch_only(path, capsys):
    recipe, _ = run(path, "prompt=[def main(, import os]", "stream=false")
    rows = [
        generate(recipe.model, torch.tensor(tokens), 24).tokens[0, len(tokens) :] for tokens in recipe.prompt_tokens
    ]
    texts = [TextStream(recipe.tokenizer, recipe.stop_tokens).text(row.tolist()) for row in rows]
    stop = next(texts[0][at : at + 4] for at in range(4, 20) if texts[0][at : at + 4] not in texts[1])
    capsys.readouterr()
    run(path, "prompt=[def main(, import os]", "batch_size=2", f"stop_strings=[{json.dumps(stop)}]")
    shown = [part.split("\n\n---")[0] for part in capsys.readouterr().out.split(">>> ")[1:]]
    assert [text.rstrip("\n") for text in shown] == [
        texts[0][: texts[0].index(stop)].rstrip("\n"),
        texts[1].rstrip("\n"),
    ]


VARIANTS = [
    "exit_layer=[1,2,3]",
    "tree_width=3; tree_children=2",
    "threshold=auto",
    "threshold=0.2",
    "prompt_lookup=2",
    "draft_vocabulary=40",
    "draft_vocabulary=[5,6,7,8,9,10,11]",
    "draft_quantizer._component_=torchao.quantization.Int8WeightOnlyConfig",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_leaves_the_output_as_it_is(path, variant):
    overrides = [f"self_speculation.{part}" for part in variant.split("; ")]
    _, report = run(path, *overrides, "prompt=[def main(, import os]", "benchmark.compare=true")
    assert report["identical"] is True and report["drafted"] > 0
    assert report["engine_efficiency"] == pytest.approx(report["speedup"] / report["ideal_speedup"])


def test_the_draft_vocabulary_of_a_file_is_its_frequent_tokens(path, tmp_path):
    (tmp_path / "text.txt").write_text("import os\n" * 9 + "zzz")
    recipe, report = run(
        path,
        "self_speculation.draft_vocabulary=4",
        f"self_speculation.draft_vocabulary_file={tmp_path / 'text.txt'}",
    )
    frequent = set(recipe.tokenizer.encode("import os\n" * 9, add_bos=False, add_eos=False))
    assert set(recipe.speculation.draft_vocabulary) <= frequent and report["drafted"] > 0


def test_the_report_says_how_near_to_the_ideal(path):
    """Efficiency is measured / ((rho d + 1) / (d c + 1)), with rho and c of the same run."""
    _, report = run(path, "benchmark.compare=true", "prompt=[def main(, import os]")
    steps = report["baseline_tokens"] - report["prompts"]
    c = (report["draft_s"] / (report["rounds"] * 3 - 2)) / (report["baseline_decode_s"] / steps)
    assert report["draft_cost"] == pytest.approx(c, rel=0.2)
    d = report["drafted"] / report["rounds"]
    ideal = (report["acceptance_rate"] * d + 1) / (d * report["draft_cost"] + 1)
    assert report["ideal_speedup"] == pytest.approx(ideal, rel=0.1)
    assert report["draft_s"] + report["verify_s"] + report["accept_s"] == pytest.approx(report["decode_s"])


@pytest.mark.parametrize("quantizer", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantised_weights_are_what_decodes(path, quantizer):
    """The logits are those of a model that torchao quantises here; all layers' weights are torchao's."""
    recipe, report = run(path, f"quantizer._component_=torchao.quantization.{quantizer}", "benchmark.compare=true")
    assert report["identical"] is True
    linears = [part for part in recipe.model.layers.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linears) == 4 * 7 and all(type(part.weight) is not torch.nn.Parameter for part in linears)
    theirs = load_decoder(load_config(str(path)), CPU, torch.float32)
    torchao.quantization.quantize_(theirs, getattr(torchao.quantization, quantizer)())
    tokens = torch.tensor([recipe.prompt_tokens[0]])
    with torch.no_grad():
        torch.testing.assert_close(recipe.model(tokens), theirs(tokens))
        assert not torch.equal(recipe.model(tokens), load_decoder(load_config(str(path)), CPU, torch.float32)(tokens))


@pytest.mark.parametrize("vocabulary", [None, 40])
def test_a_quantised_draft_is_of_the_early_layers_and_the_head(path, vocabulary):
    """The head too, but where drafts have one of their own; the model and what it shares are as they were."""
    quantizer = "self_speculation.draft_quantizer._component_=torchao.quantization.Int8WeightOnlyConfig"
    recipe, _ = run(path, quantizer, *([f"self_speculation.draft_vocabulary={vocabulary}"] if vocabulary else []))
    drafter, model = recipe.speculation.drafter, recipe.model
    assert len(drafter.layers) == recipe.speculation.exits[-1]
    linears = [part for part in drafter.layers.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linears) == 7 * len(drafter.layers)
    assert all(type(part.weight) is not torch.nn.Parameter for part in linears)
    assert all(type(weight) is torch.nn.Parameter for weight in model.parameters())
    assert drafter.norm is model.norm and drafter.tok_embeddings is model.tok_embeddings
    assert (drafter.output is model.output) == (vocabulary is not None)
    if vocabulary is None:
        x = torch.randn(1, 3, model.tok_embeddings.embedding_dim)
        expected = torch.nn.Linear(x.shape[-1], model.tok_embeddings.num_embeddings, bias=False)
        expected.weight.data = getattr(model.output, "tied_module", model.output).weight.data.clone()
        torchao.quantization.quantize_(expected, torchao.quantization.Int8WeightOnlyConfig())
        with torch.no_grad():
            torch.testing.assert_close(drafter.output(x), expected(x))


def test_a_quantiser_that_does_not_work_here_is_named(path):
    with pytest.raises(ValueError, match=r"^quantizer: .*Float8WeightOnlyConfig does not work on cpu \("):
        run(path, "quantizer._component_=torchao.quantization.Float8WeightOnlyConfig")


def test_a_quantiser_that_changes_nothing_is_refused(path):
    """torchao leaves layers that groups do not fit as they are."""
    quantizer = ["quantizer._component_=torchao.quantization.Int4WeightOnlyConfig", "quantizer.group_size=64"]
    with pytest.raises(
        ValueError, match=r"^quantizer: .*Int4WeightOnlyConfig changes no weight of this model.*divisor"
    ):
        run(path, *quantizer)


def test_compile_is_reported_apart_and_changes_no_token(path, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    outputs = []
    for flag in ("false", "true"):
        out = tmp_path / f"{flag}.jsonl"
        _, report = run(path, f"compile={flag}", f"output_file={out}", "benchmark.compare=true")
        assert report["identical"] is True
        assert (report["compile_s"] > 0) is (flag == "true")
        outputs.append(out.read_text())
    assert outputs[0] == outputs[1]


def test_interactive_keeps_the_conversation_and_its_cache(path, tmp_path):
    """Two questions by standard input: the second prompt holds the first answer, whose cache is not computed again."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<reply>{% endif %}"
    overrides = [f"tokenizer.chat_template={json.dumps(template)}", "prompt=interactive", "max_new_tokens=8"]
    recipe = LayerSkipGenerate(load_config(str(path), [*overrides, "system_prompt=be"]))
    recipe.setup()
    monkey = pytest.MonkeyPatch()
    monkey.setattr("sys.stdin", io.StringIO("hello\n\nand now\n/exit\n"))
    seen = []
    monkey.setattr(recipe, "_generation", lambda prompts, *a, old=recipe._generation, **k: seen.append(
        (prompts[0], made := old(prompts, *a, **k))) or made)  # fmt: skip
    report = recipe.generate()
    monkey.undo()
    assert report["prompts"] == 2
    (first, one), (second, two) = seen
    decode = recipe.tokenizer.decode
    assert decode(first) == "<system>be<user>hello<reply>"
    answer = TextStream(recipe.tokenizer, recipe.stop_tokens).text(one.generated[0])
    assert decode(second) == f"<system>be<user>hello<assistant>{answer}<user>and now<reply>"
    common = next(i for i, (a, b) in enumerate(zip(first + one.generated[0], second, strict=False)) if a != b)
    assert two.stats.reused_tokens == min(common, len(first) + len(one.generated[0]) - 1) > 4
    assert two.stats.prefill_tokens == len(second) - two.stats.reused_tokens
    alone = generate(recipe.model, torch.tensor(second), 8, stop_tokens=recipe.stop_tokens)
    assert two.generated[0] == alone.tokens[0, len(second) :].tolist()


def test_ctrl_c_ends_with_the_report_so_far(path, monkeypatch, capsys):
    recipe = LayerSkipGenerate(load_config(str(path), ["prompt=[a, b, c]"]))
    recipe.setup()
    calls = []

    def interrupted(batch, *args, run=recipe._run, **kwargs):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(batch, *args, **kwargs)

    monkeypatch.setattr(recipe, "_run", interrupted)
    assert recipe.generate()["prompts"] == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompts"] == 2


@pytest.mark.parametrize("compare", [False, True])
def test_ctrl_c_within_a_text_keeps_it_as_far_as_it_came(path, compare, monkeypatch, capsys):
    """In the second of three prompts, after two rounds; in a comparison it has no counterpart, and stays out."""
    out = path.parent / "out.jsonl"
    overrides = ["prompt=[a, b, c]", f"output_file={out}", f"benchmark.compare={str(compare).lower()}"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    rounds = []

    def interrupted(self, round_=Generation._round):
        rounds.append(self.prompts[0])
        if rounds.count(recipe.prompt_tokens[1]) == 3:
            raise KeyboardInterrupt
        return round_(self)

    monkeypatch.setattr(Generation, "_round", interrupted)
    report = recipe.generate()
    first, second = map(json.loads, out.read_text().splitlines())
    assert "interrupted" not in first and second["interrupted"] is True and second["prompt"] == "b"
    assert 3 <= second["tokens"] < 24 and second["text"] in capsys.readouterr().out
    assert report["prompts"] == 2 - compare
    assert report["tokens"] == first["tokens"] + (0 if compare else second["tokens"])


def test_ctrl_c_compares_what_both_ways_did(path, monkeypatch):
    """It comes after the baseline's second prompt, before ours."""
    recipe = LayerSkipGenerate(load_config(str(path), ["prompt=[a, b, c]", "benchmark.compare=true"]))
    recipe.setup()
    calls = []

    def interrupted(batch, limit, plain=False, run=recipe._run, **kwargs):
        calls.append((*batch, plain))
        if calls[2:] == [(0, True), (0, False), (1, True), (1, False)]:
            raise KeyboardInterrupt
        return run(batch, limit, plain=plain, **kwargs)

    monkeypatch.setattr(recipe, "_run", interrupted)
    report = recipe.generate()
    assert (report["prompts"], report["identical"]) == (1, True)
    assert report["baseline_tokens"] == report["tokens"]


@pytest.mark.parametrize(("temperature", "shown"), [(0.0, "-"), (0.8, "- (sampling)")])
def test_ctrl_c_in_the_warm_up_compares_nothing(path, monkeypatch, capsys, temperature, shown):
    recipe = LayerSkipGenerate(load_config(str(path), ["benchmark.compare=true", f"temperature={temperature}"]))
    recipe.setup()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "_run", interrupted)
    assert recipe.generate()["identical"] is None
    assert f"identical output   {shown}\n" in capsys.readouterr().out


def test_each_answer_is_printed_once(path, capsys):
    """A batch that is left with one prompt, too."""
    run(path, "prompt=[one, two, three]", "batch_size=2")
    out = capsys.readouterr().out
    assert [out.count(f"--- prompt {i} of 3") for i in (1, 2, 3)] == [1, 1, 1]


def test_answers_of_a_run_that_is_killed(path, tmp_path, monkeypatch):
    """The last prompt is the shortest: its answer comes first, and the file of before is there until the end."""
    out = tmp_path / "out.jsonl"
    partial, seen = out.with_name("out.jsonl.partial"), []
    out.write_text("yesterday's")
    lines = ["a = 1; b = 2; c", "import os; x = 3", "a", "b"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    overrides = [f"prompt_file={tmp_path / 'prompts.jsonl'}", f"output_file={out}", "batch_size=2"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()

    def watched(batch, *args, run=recipe._run, **kwargs):
        seen.append((out.read_text(), partial.read_text().splitlines()))
        return run(batch, *args, **kwargs)

    monkeypatch.setattr(recipe, "_run", watched)
    recipe.generate()
    assert seen[0] == ("yesterday's", []) and seen[1][0] == "yesterday's"
    whole = out.read_text().splitlines()
    assert [json.loads(line)["index"] for line in whole] == [0, 1, 2, 3]
    assert seen[1][1] == whole[2:] and not partial.exists()


def test_what_a_killed_run_left_is_kept(path, tmp_path, caplog):
    """The same command again, twice: each leaves the answers of before under another name."""
    out = tmp_path / "out.jsonl"
    for left in ("first", "second"):
        Path(f"{out}.partial").write_text(left)
        with caplog.at_level("WARNING", logger=get_logger().name):
            recipe = LayerSkipGenerate(load_config(str(path), [f"output_file={out}"]))
            recipe.setup()
            recipe.generate()
    assert sorted(file.name for file in tmp_path.glob("out.jsonl.*")) == ["out.jsonl.partial.1", "out.jsonl.partial.2"]
    assert [Path(f"{out}.partial.{n}").read_text() for n in (1, 2)] == ["first", "second"]
    assert f"{out}.partial.2" in caplog.messages[-1]


def test_prompts_that_differ_between_ranks_are_refused(path, monkeypatch):
    compared = []
    monkeypatch.setattr("layerskip_recipes.generation.recipe.same_on_all", lambda value: compared.append(value) or True)
    recipe = LayerSkipGenerate(load_config(str(path)))
    assert compared == [([0], recipe.prompt_tokens)]
    monkeypatch.setattr("layerskip_recipes.generation.recipe.same_on_all", lambda value: False)
    with pytest.raises(ValueError, match=r"^prompts: differ between ranks\. .*prompt_file="):
        LayerSkipGenerate(load_config(str(path)))


def test_half_a_character_is_a_bad_prompt(path, tmp_path):
    """JSON can have it, UTF-8 cannot."""
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "a = 1"}\n{"prompt": "\\ud83d hi"}\n{"prompt": {"user": "x", "system": "\\ud83d"}}\n')
    with pytest.raises(ValueError, match=r"^prompt_file line 2: .* half of a character.*also lines 3"):
        run(path, f"prompt_file={file}")
    _, report = run(path, f"prompt_file={file}", "on_bad_prompt=skip", f"output_file={out}")
    assert (report["prompts"], report["skipped"]) == (1, 2) and len(out.read_text().splitlines()) == 3


def test_a_question_in_another_encoding_is_left_out(path, monkeypatch, caplog):
    lines = iter(["hi", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "and now"])

    def read(prompt):
        line = next(lines, "/exit")
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    overrides = [f"tokenizer.chat_template={json.dumps(CHAT)}", "prompt=interactive", "max_new_tokens=4"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    assert recipe.generate()["prompts"] == 2
    assert sum("the question is left out: 'utf-8'" in record.getMessage() for record in caplog.records) == 1


def test_an_answer_that_was_interrupted_before_its_first_token_is_none(path, monkeypatch):
    """It counts in no figure, and the conversation goes on without it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand now\n"))
    overrides = [f"tokenizer.chat_template={json.dumps(CHAT)}", "prompt=interactive", "max_new_tokens=4"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    asked = []

    def prefill(self, whole=Generation._prefill):
        asked.append(self.prompts[0])
        if len(asked) == 1:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(Generation, "_prefill", prefill)
    report = recipe.generate()
    assert report["prompts"] == 1 and report["tokens"] <= 4
    assert "hi" not in recipe.tokenizer.decode(asked[1])


def test_what_stop_strings_cut_is_not_counted_after_ctrl_c(path):
    """Of a round that gave three tokens one is kept."""
    recipe = LayerSkipGenerate(load_config(str(path)))
    tokens = recipe.tokenizer.encode("a = 1", add_bos=False, add_eos=False)
    text = recipe.tokenizer.decode(tokens[:1])

    class Interrupted:
        generated, finished, stats = [list(tokens)], [False], SimpleNamespace(tokens=len(tokens))

        def __iter__(self):
            yield [list(tokens)]
            raise KeyboardInterrupt

    generation = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        follow(generation, [TextStream(recipe.tokenizer, [], [text])])
    assert generation.finished == [True] and generation.stats.tokens == len(generation.generated[0]) == 1 < len(tokens)


def test_a_conversation_has_no_baseline(path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    overrides = [f"tokenizer.chat_template={json.dumps(template)}", "prompt=interactive", "benchmark.compare=true"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    report = recipe.generate()
    assert report["prompts"] == 1 and "identical" not in report


def test_drafts_are_shown_dim_and_replaced(path, capsys, monkeypatch):
    """On a terminal: without what is between saving and restoring the cursor, the text is the accepted text."""
    run(path)
    plain = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run(path, "stream=draft")
    shown = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
    assert "\x1b[2m" in shown
    assert re.sub(r"\x1b\[s.*?\x1b\[u\x1b\[J", "", shown) == plain


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens):
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("shown", "draft", "seen"),
    [
        ("", "abcdefghijklmnop", "abcdefghi"),  # of ten columns the last stays free
        ("abcd", "efghijklmnop", "efghi"),
        ("abcd\nab", "cdefghijklmnop", "cdefghi"),
        ("abcdefghijklm", "nopqrstuvwxyz", "nopqrs"),  # the terminal wrapped it
        ("abcdefghij", "klm", ""),
        ("ab日本", "日本語", "日"),  # two columns each
        ("e\u0301" * 4, "abcdefgh", "abcde"),  # an accent takes none
        ("a\tb", "cd", ""),
        ("ab", "c\rd", "c"),
        ("ab", "c\nd", "c"),
        ("ab", "", ""),
    ],
)
def test_a_draft_stays_in_its_line(shown, draft, seen, capsys, monkeypatch):
    """On a terminal of ten columns, whose cursor could not come back from another row."""
    monkeypatch.setenv("COLUMNS", "10")
    stream = TextStream(Letters())
    tokens = list(map(ord, shown))
    for end in range(1, len(tokens) + 1):
        stream.show(tokens[:end], last=False)
    capsys.readouterr()
    stream.show_draft([list(map(ord, draft))])
    assert capsys.readouterr().out == f"\x1b[s\x1b[2m{seen}\x1b[0m"


def test_a_draft_stays_in_the_line_of_the_prompts_mark(path, capsys, monkeypatch):
    """Ten columns, of which ">>> " takes four: no more than five of a draft."""
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run(path, "stream=draft", "max_new_tokens=4")
    first = re.search(r">>> (.*?)\x1b\[s\x1b\[2m(.*?)\x1b\[0m", capsys.readouterr().out, flags=re.S)
    assert "\n" not in first[1] and len(first[1] + first[2]) <= 5


def test_ctrl_c_leaves_no_draft_on_the_screen(path, capsys, monkeypatch):
    """It comes while a draft is verified: the screen ends with the accepted text, as the file has it."""
    out = path.parent / "out.jsonl"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    recipe = LayerSkipGenerate(load_config(str(path), ["stream=draft", f"output_file={out}"]))
    recipe.setup()
    rounds = []

    def interrupted(self, *args, verify=Generation._verify):
        rounds.append(1)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return verify(self, *args)

    monkeypatch.setattr(Generation, "_verify", interrupted)
    recipe.generate()
    shown = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
    assert shown.count("\x1b[2m") == shown.count("\x1b[u\x1b[J") == 3
    text = json.loads(out.read_text())["text"]
    assert text and re.sub(r"\x1b\[s.*?\x1b\[u\x1b\[J", "", shown, flags=re.S).rstrip("\n") == text.rstrip("\n")


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<reply>{% endif %}"


def test_a_question_that_does_not_fit_is_left_out(path, monkeypatch, caplog):
    """The conversation goes on as if it had not been asked, and the message says how long one may be."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hi\n{'x' * 150}\nand now\n"))
    overrides = [f"tokenizer.chat_template={json.dumps(CHAT)}", "prompt=interactive", "max_new_tokens=8"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    asked = []
    monkeypatch.setattr(recipe, "_generation", lambda prompts, *a, old=recipe._generation, **k: asked.append(
        prompts[0]) or old(prompts, *a, **k))  # fmt: skip
    assert recipe.generate()["prompts"] == 2
    assert "x" * 5 not in recipe.tokenizer.decode(asked[1]) and recipe.tokenizer.decode(asked[1]).endswith(
        "and now<reply>"
    )
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    room = int(re.search(r"at most (\d+) tokens", message)[1])
    # After it "and now" was asked: the question's tokens take what is left of the 128.
    question = len(recipe.tokenizer.encode("and now", add_bos=False, add_eos=False))
    assert room == 128 - 8 - (len(asked[1]) - question)


def test_a_conversation_ends_where_no_question_fits(path, monkeypatch, caplog):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n" * 30))
    overrides = [f"tokenizer.chat_template={json.dumps(CHAT)}", "prompt=interactive", "max_new_tokens=16"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    report = recipe.generate()
    assert 1 <= report["prompts"] < 128 // 16
    assert [r.getMessage().partition(":")[0] for r in caplog.records].count("the conversation is over") == 1


def test_what_a_template_refuses_ends_no_conversation(path, monkeypatch, caplog):
    """The question is left out, and the report comes as ever. What it refuses from the start is refused before."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nbad\nand now\n"))
    refuses = (
        "{% if messages[-1].content == 'bad' or messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    )
    overrides = [f"tokenizer.chat_template={json.dumps(refuses + CHAT)}", "prompt=interactive", "max_new_tokens=8"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    assert recipe.generate()["prompts"] == 2
    assert sum("left out" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(ValueError, match=r"the tokenizer refuses .*: no$"):
        LayerSkipGenerate(load_config(str(path), [*overrides, "system_prompt=be"]))


def test_other_ranks_log_errors_only(monkeypatch):
    def logged(rank, level):
        monkeypatch.setenv("RANK", rank)
        return is_for_all(logging.makeLogRecord({"levelno": level}))

    assert logged("0", logging.INFO) and logged("1", logging.ERROR) and logged("3", logging.CRITICAL)
    assert not logged("1", logging.INFO) and not logged("1", logging.WARNING)


def test_ctrl_c_ends_the_command_with_the_report_and_status_130(path, tmp_path):
    """A real `tune run`, in the midst of more prompts than it gets to."""
    file = tmp_path / "many.jsonl"
    file.write_text('{"prompt": "def main("}\n' * 20_000)
    command = [
        Path(sys.executable).with_name("tune"),
        "run",
        "layerskip_generate",
        "--config",
        path,
        f"prompt_file={file}",
    ]
    with subprocess.Popen(
        [*map(str, command), "max_new_tokens=64"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not process.stdout.readline().startswith("--- prompt 3 of 20000"):
            assert process.poll() is None, process.stderr.read()[-2000:]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-2000:]
    assert 2 <= json.loads(out.splitlines()[-1])["prompts"] < 20_000
    assert err.count("interrupted") == 1 and "Traceback" not in err


def test_two_processes_give_the_output_of_one(path, tmp_path, capsys):
    """Sharded over two gloo processes, with drafts and without: the same text, printed once, as what is logged."""
    overrides = ["benchmark.compare=true", "prompts._component_=layerskip_recipes.quickstart.heldout_prompts"]
    _, alone = run(path, *overrides)
    text = capsys.readouterr().out.split("\n--- ")[1].replace("\r\n", "\n").replace("\r", "\n")  # as from a process
    done = run_tune(
        "run", "--nproc_per_node", "2", "layerskip_generate", "--config", str(path), *overrides, cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n--- ")[1] == text and done.stdout.count("--- prompt 1 of 1") == 1
    # Behind it torchtune's launcher may say that it uses torchrun, when its own output is flushed.
    report = json.loads([line for line in done.stdout.splitlines() if line != "Running with torchrun..."][-1])
    for key in ("identical", "tokens", "rounds", "accepted", "baseline_tokens"):
        assert report[key] == alone[key]
    assert report["identical"] is True
    assert done.stderr.count("prompt: takes the place of prompts") == 1


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("compile=true", "compile"),
        ("prompt=interactive", "prompt"),
        ("prompt_file=-", "prompt_file"),
        (
            "self_speculation.draft_quantizer._component_=torchao.quantization.Int8WeightOnlyConfig",
            "self_speculation.draft_quantizer",
        ),
    ],
)
def test_what_works_in_one_process_only_is_refused_in_several(path, monkeypatch, override, key):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: .*one process, and there are 2"):
        LayerSkipGenerate(load_config(str(path), [override]))


def test_a_prompt_file_beside_prompt_interactive_is_for_several_processes(path, monkeypatch, tmp_path):
    """The file takes the place of the conversation."""
    (tmp_path / "one.txt").write_text("x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_config(load_config(str(path), ["prompt=interactive", f"prompt_file={tmp_path / 'one.txt'}"]))


# Of the tiny model: 9,600 for the embedding, which is the head too, and for each of 4 layers 32 x 32 (q), 2 x 16 x 32
# (k, v), 32 x 32 (output), 3 x 32 x 48 (MLP) and 2 x 32 (norms); 32 of the last norm.
LAYER, REST = 1024 + 1024 + 1024 + 4608 + 64, 9600 + 32
# Of a slot of the cache: 4 layers x 2 (keys, values) x 1 head x 16, in fp32.
SLOT = 4 * 2 * 16 * 4


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("draft", ["", "self_speculation.num_speculations=5", "self_speculation=null"])
def test_weights_caches_and_drafts_must_fit_the_memory(path, monkeypatch, compiled, draft):
    """To the byte: two rows of the prompt, 24 new tokens, and the draft; compiled, of the size that steps know."""
    overrides = ["batch_size=2", "prompt=[a, b]", f"compile={str(compiled).lower()}", *filter(None, [draft])]
    nodes = {"": 4, "self_speculation=null": 1}.get(draft, 6)
    slots = 256 + 64 if compiled else 1 + 24 + nodes
    weights = 4 * (4 * LAYER + REST)

    def with_memory(memory):
        monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}.get)
        return LayerSkipGenerate(load_config(str(path), overrides))

    with_memory(weights + 2 * slots * SLOT)
    message = r"^batch_size: the caches of 2 rows .* weights take .* up to 1; for example batch_size=1$"
    with pytest.raises(ValueError, match=message):
        with_memory(weights + 2 * slots * SLOT - 1)
    message = rf"^max_new_tokens: .* Allowed here: up to {slots - 1} positions"
    with pytest.raises(ValueError, match=message):
        with_memory(weights + slots * SLOT - 1)
    with pytest.raises(ValueError, match=r"^model: its weights take .* for example dtype=bf16"):
        with_memory(weights)


def test_a_benchmark_must_fit_the_memory(tmp_path, checkpoint, monkeypatch):
    """The deepest draft of its variants counts: a sampled tree with its root and 2 x (1 + 2) nodes, and the drafts."""
    variants = {"tree": {"exit_layer": 2, "num_speculations": 2, "tree_width": 2, "tree_children": 2}}
    path = benchmark_config(tmp_path, checkpoint, prompt=["a", "b"], batch_size=2, variants=variants)
    need = 4 * (4 * LAYER + REST) + 2 * (1 + 16 + 7) * SLOT

    def with_memory(memory):
        monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}.get)
        LayerSkipBenchmark(load_config(str(path)))

    with_memory(need)
    with pytest.raises(ValueError, match=r"^batch_size: .* up to 1; for example batch_size=1$"):
        with_memory(need - 1)


@pytest.mark.parametrize(("kept", "shards", "parallel", "bytes_"), [
    (0, 1, 1, 2 * (4 * LAYER + REST)),
    (2, 1, 1, 2 * (4 * LAYER + REST)),
    (2, 2, 1, 2 * (2 * LAYER + REST + LAYER)),
    (0, 4, 1, 2 * (REST + LAYER)),
    (2, 2, 2, 2 * (2 * LAYER + REST + LAYER) // 2),
])  # fmt: skip
def test_the_weights_of_each_process(kept, shards, parallel, bytes_):
    """In bf16: layers below the exit whole, the others sharded; matrices split by tensor parallelism."""
    with torch.device("meta"):
        model = tune_config.instantiate(OmegaConf.create(MODEL))
    assert weight_bytes(model, torch.bfloat16, kept, shards, parallel) == bytes_


LINES = [
    '{"prompt": "a = 1"}',
    '{"prompt: "b"}',
    "",
    '{"prompt": ""}',
    '{"prompt": "x = 2"}',
    json.dumps({"prompt": "long " * 99}),
]


@pytest.mark.parametrize("size", [1, 2])
def test_bad_prompts_are_skipped_and_have_their_place(path, tmp_path, capsys, caplog, size):
    """Broken, empty and too long, after a byte order mark; the answers to the others are those that they have alone."""
    file, out, good = (tmp_path / name for name in ("prompts.jsonl", "out.jsonl", "good.jsonl"))
    file.write_text("\n".join(LINES), encoding="utf-8-sig")
    _, report = run(path, f"prompt_file={file}", "on_bad_prompt=skip", f"output_file={out}", f"batch_size={size}")
    run(path, "prompt=[a = 1, x = 2]", f"output_file={good}", f"batch_size={size}")
    alone = [
        json.loads(line) | {"index": index} for line, index in zip(good.read_text().splitlines(), (0, 3), strict=True)
    ]
    first, broken, empty, last, long = map(json.loads, out.read_text().splitlines())
    assert [first, last] == alone and (report["prompts"], report["skipped"]) == (2, 3)
    for at, (line, number, what) in enumerate(
        [(broken, 2, "no JSON"), (empty, 4, "empty"), (long, 6, "128 (max_seq_len)")], 1
    ):
        assert line == {"index": at + (at == 3), "line": number, "error": line["error"]}
        assert what in line["error"] and f"line {number}" in line["error"]
        assert [record.getMessage() for record in caplog.records].count(f"skipped: {line['error']}") == 1


def test_a_bad_prompt_is_an_error_that_names_its_line(path, tmp_path):
    """Of several that of the longest prompt, since what is allowed for it is enough for all."""
    file = tmp_path / "prompts.jsonl"

    def refused(lines, *overrides):
        file.write_text("\n".join(lines))
        with pytest.raises(ValueError) as caught:
            LayerSkipGenerate(load_config(str(path), [f"prompt_file={file}", *overrides]))
        return str(caught.value)

    message = refused([*LINES, '{"prompt": "' + "a" * 110 + '"}'], "max_new_tokens=120")
    assert message.startswith("prompt: its ") and message.endswith(
        "(prompt_file line 6) (also lines 2, 4, 7). on_bad_prompt=skip answers the rest"
    )
    message = refused(LINES[:2])
    assert message.startswith('prompt_file line 2: \'{"prompt: "b"}\' is no JSON object')
    assert message.endswith(". on_bad_prompt=skip answers the rest")
    assert "on_bad_prompt" not in refused(LINES[1:2], "on_bad_prompt=skip")  # nothing else to answer
    template = "{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[0].content }}"
    asked = [{"user": "a"}, {"user": "a", "system": "b"}]
    message = refused(
        [json.dumps({"prompt": chat}) for chat in asked], f"tokenizer.chat_template={json.dumps(template)}"
    )
    assert "no system (prompt_file line 2)." in message


def test_bytes_that_are_no_utf8_break_their_line_only(path, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "a\xff"}\n{"prompt": "\xc3\xa9"}\n')
    recipe = LayerSkipGenerate(load_config(str(path), [f"prompt_file={file}", "on_bad_prompt=skip"]))
    assert recipe.prompts == ["", "é"] and "prompt_file line 1: " in recipe.examples[0].error


def test_a_byte_order_mark_is_no_part_of_a_prompt(path, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("a", encoding="utf-8-sig")
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffa"))
    for name in (tmp_path / "one.txt", "-"):
        assert LayerSkipGenerate(load_config(str(path), [f"prompt_file={name}"])).prompts == ["a"]


def test_the_output_file_is_none_that_the_run_reads(path, tmp_path):
    """By whatever name: a link to it, or the same file by another path."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    vocabulary = [
        "self_speculation.draft_vocabulary=9",
        f"self_speculation.draft_vocabulary_file={tmp_path / 'a.jsonl'}",
    ]
    (tmp_path / "b.jsonl").write_text('{"prompt": "b"}\n')
    path_, shots, source = (f"prompts.{key}={tmp_path / 'a.jsonl'}" for key in ("path", "shots", "source"))
    file, table = (
        ["prompt=null", f"prompts._component_=layerskip_recipes.tasks.{name}"] for name in ("jsonl", "topv2")
    )
    for overrides, key in (
        ([f"prompt_file={tmp_path / 'a.jsonl'}"], "prompt_file"),
        (vocabulary, vocabulary[1].split("=")[0]),
        ([*file, path_], "prompts.path"),
        ([*file, f"prompts.path={tmp_path / 'b.jsonl'}", "prompts.n_shot=1", shots], "prompts.shots"),
        ([*table, source], "prompts.source"),
    ):
        for name in ("a.jsonl", "link.jsonl", f"../{tmp_path.name}/a.jsonl"):
            with pytest.raises(
                ValueError, match=rf"^output_file: .* would overwrite {re.escape(key)}\. .*=answers\.jsonl"
            ):
                LayerSkipGenerate(load_config(str(path), [*overrides, f"output_file={tmp_path / name}"]))
    assert (tmp_path / "a.jsonl").read_text() == '{"prompt": "a"}\n'


@pytest.mark.parametrize("there", [False, True])
def test_an_output_file_that_cannot_be_written(path, tmp_path, monkeypatch, there):
    """A folder or a file without permission, which root, who may run this, would have."""
    protected = tmp_path / "folder"
    protected.mkdir()
    if there:
        (protected / "a.jsonl").touch()
    access = os.access
    monkeypatch.setattr("os.access", lambda name, mode: not Path(name).is_relative_to(protected) and access(name, mode))
    with pytest.raises(ValueError, match=r"^output_file: .* cannot be written"):
        LayerSkipGenerate(load_config(str(path), [f"output_file={protected / 'a.jsonl'}"]))


def test_an_existing_output_file_needs_no_folder(path, monkeypatch):
    access = os.access
    monkeypatch.setattr("os.access", lambda name, mode: Path(name) != Path("/dev") and access(name, mode))
    check_config(load_config(str(path), ["output_file=/dev/null"]))


def test_prompt_files_and_standard_input(path, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("import sys\n")
    (tmp_path / "two.jsonl").write_text(
        '{"prompt": "import sys\\n"}\n\n{"prompt": {"user": "hi", "system": "be brief"}}\n'
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("import sys\n"))

    def prompts(name):
        return LayerSkipGenerate(load_config(str(path), [f"prompt_file={name}"])).prompts

    assert prompts(tmp_path / "one.txt") == prompts("-") == ["import sys\n"]
    assert prompts(tmp_path / "two.jsonl") == ["import sys\n", {"user": "hi", "system": "be brief"}]


def test_what_a_prompt_takes_from_other_keys_is_filled_in(path):
    cfg = load_config(str(path), ["prompt=null", 'prompt.user="Tell me about ${max_new_tokens} ${tokenizer.path}"'])
    assert LayerSkipGenerate(cfg).prompts == [{"user": f"Tell me about {cfg.max_new_tokens} {cfg.tokenizer.path}"}]


def test_the_tokenizers_limit_of_a_training_cuts_no_prompt(path):
    limited = LayerSkipGenerate(load_config(str(path), ["prompt='x = 1 + 2 + 3 + 4'", "tokenizer.max_seq_len=4"]))
    free = LayerSkipGenerate(load_config(str(path), ["prompt='x = 1 + 2 + 3 + 4'"]))
    assert limited.prompt_tokens == free.prompt_tokens and len(free.prompt_tokens[0]) > 4
    assert limited.tokenizer.max_seq_len == 4


@pytest.mark.parametrize(
    ("tokenizer", "leaves_it_open"),
    [
        ("llama2.Llama2Tokenizer", True),
        ("llama3.Llama3Tokenizer", True),
        *((name, False) for name in ("mistral.MistralTokenizer", "gemma.GemmaTokenizer", "phi3.Phi3MiniTokenizer")),
        *((name, False) for name in ("qwen2.Qwen2Tokenizer", "qwen2_5.Qwen2_5Tokenizer", "phi4.Phi4Tokenizer")),
    ],
)
def test_a_chat_needs_a_tokenizer_that_leaves_the_last_turn_open(tokenizer, leaves_it_open):
    """Without files an instance can do nothing else, so one that may try ends in another error."""
    module, name = tokenizer.split(".")
    kind = getattr(importlib.import_module(f"torchtune.models.{module}._tokenizer"), name)
    message = (
        "^prompt: the tokenizer refuses" if leaves_it_open else rf"^tokenizer: {name} closes .*hf_tokenizer, path:"
    )
    for prompt in ({"user": "hi"}, [Message(role="user", content="hi"), Message(role="assistant", content="")]):
        with pytest.raises(ValueError, match=message):
            to_tokens(prompt, kind.__new__(kind))


def test_a_chat_prompt_goes_through_the_template(path, checkpoint, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<reply>{% endif %}"
    overrides = [f"tokenizer.chat_template={json.dumps(template)}", "prompt=null", "prompt.system=be", "prompt.user=hi"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    assert recipe.tokenizer.decode(recipe.prompt_tokens[0]) == "<system>be<user>hi<reply>"


def test_a_torchtune_quantizer_keeps_output_identical_to_the_quantised_model(path):
    _, report = run(
        path, "quantizer._component_=torchtune.training.quantization.Int8DynActInt4WeightQuantizer",
        "quantizer.groupsize=16", "benchmark.compare=true",
    )  # fmt: skip
    assert report["identical"] is True


def test_tune_run_prints_only_text_and_report_on_stdout(path, tmp_path):
    run_ = run_tune("run", "layerskip_generate", "--config", str(path), "benchmark.compare=true", cwd=tmp_path)
    assert run_.returncode == 0, run_.stderr[-2000:]
    assert run_.stdout.startswith("\n--- prompt 1 of 1\ndef main(\n>>> ")
    assert json.loads(run_.stdout.splitlines()[-1])["identical"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["generate.yaml"]


def test_eval_measures_every_exit(tmp_path, checkpoint, capsys):
    """Loss, accuracy and agreement by plain PyTorch over the same samples; the picture is a PNG."""
    path = eval_config(tmp_path, checkpoint, picture=str(tmp_path / "exits.png"), num_speculations=3)
    recipe = LayerSkipEval(load_config(str(path)))
    recipe.setup()
    report = recipe.evaluate()
    model = tune_config.instantiate(OmegaConf.create(MODEL))
    model.load_state_dict(recipe.model.state_dict())
    tokens = torch.tensor([sample["tokens"] for sample in recipe.batches.dataset])
    labels = tokens[:, 1:].flatten()
    with torch.no_grad():
        h, logits = model.tok_embeddings(tokens), {}
        for i, layer in enumerate(model.layers):
            h = layer(h)
            logits[i + 1] = model.output(model.norm(h))[:, :-1].flatten(0, 1)
    assert list(report["exits"]) == [1, 2, 3, 4]
    for e, quality in report["exits"].items():
        assert quality["loss"] == pytest.approx(F.cross_entropy(logits[e], labels).item(), abs=1e-4)
        agree = (logits[e].argmax(-1) == logits[4].argmax(-1)).float().mean().item()
        assert quality["agreement"] == pytest.approx(agree, abs=1e-3)
        assert quality["accuracy"] == pytest.approx((logits[e].argmax(-1) == labels).float().mean().item(), abs=1e-3)
        # Of 3 tokens drafted from each position of a sample whose next 3 labels are there.
        same = (logits[e].argmax(-1) == logits[4].argmax(-1)).view(len(tokens), -1).tolist()
        runs = [sum(all(row[i : i + k]) for k in (1, 2, 3)) for row in same for i in range(len(row) - 2)]
        assert quality["accepted_length"] == pytest.approx(sum(runs) / len(runs), abs=1e-3)
    assert (tmp_path / "exits.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["batches"] == 2


def test_eval_compares_checkpoints(tmp_path, checkpoint, tokenizer_folder):
    """Each has the figures that it has alone; the report is a file too."""
    other = make_checkpoint(tmp_path / "other", tokenizer_folder, seed=1)

    def evaluate(**changes):
        recipe = LayerSkipEval(load_config(str(eval_config(tmp_path, **changes))))
        recipe.setup()
        return recipe.evaluate()

    alone = {folder: evaluate(checkpoint=folder)["exits"] for folder in (checkpoint, other)}
    report = tmp_path / "report" / "exits.json"
    both = evaluate(checkpoint=checkpoint, compare={"other": {"checkpoint_dir": str(other)}}, report=str(report))
    assert both["exits"] == alone[checkpoint] != alone[other] == both["compare"]["other"]
    assert json.loads(report.read_text()) == json.loads(json.dumps(both))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("the second checkpoint is broken")])
def test_eval_loses_nothing_that_it_measured(tmp_path, checkpoint, monkeypatch, capsys, error):
    """The report says so; it goes beside a complete one of before, and so does the picture."""
    report, picture = tmp_path / "exits.json", tmp_path / "exits.png"
    compare = {"other": {"checkpoint_dir": str(checkpoint)}}
    files = {"report": str(report), "picture": str(picture)}
    recipe = LayerSkipEval(load_config(str(eval_config(tmp_path, checkpoint, compare=compare, **files))))
    recipe.setup()
    exits_of = recipe._measure_exits

    def first_only(name):
        if name == "other":
            raise error
        return exits_of(name)

    monkeypatch.setattr(recipe, "_measure_exits", first_only)
    complete = '{"exits": {}}'
    for stem in ("exits", "exits_interrupted"):
        with nullcontext() if error is KeyboardInterrupt else pytest.raises(RuntimeError, match="is broken"):
            recipe.evaluate()
        found = json.loads(report.with_stem(stem).read_text())
        assert list(found["exits"]) == ["1", "2", "3", "4"] and found["compare"] == {} and found["interrupted"] is True
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
        assert found["picture"] == str(picture.with_stem(stem)) and picture.with_stem(stem).is_file()
        # Were that one complete:
        report.write_text(complete)
        picture.write_text(complete)
    assert report.read_text() == picture.read_text() == complete


def test_an_evaluation_that_measured_nothing_leaves_the_last_report(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "exits.json").write_text("yesterday's")
    recipe = LayerSkipEval(load_config(str(eval_config(tmp_path, checkpoint, report=str(tmp_path / "exits.json")))))
    recipe.setup()
    monkeypatch.setattr(recipe, "_measure_exits", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe.evaluate()
    assert (tmp_path / "exits.json").read_text() == "yesterday's"


@pytest.mark.parametrize("changes", [{"report": "folder"}, {"report": "file/exits.json"}, {"picture": "exits.txt"}])
def test_eval_checks_what_it_will_write(tmp_path, checkpoint, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    [(key, value)] = changes.items()
    with pytest.raises(ValueError, match=rf"^{key}: '{value}' |^{key}: 'file' cannot be written"):
        LayerSkipEval(load_config(str(eval_config(tmp_path, checkpoint, **changes))))


def test_a_generation_config_becomes_an_evaluation(tmp_path, checkpoint, path):
    """What means nothing here is switched off by null, and refused by its name where it is not."""
    data = {"_component_": "layerskip_recipes.quickstart.StdlibDataset", "split": "heldout", "seq_len": 64}
    off = dict.fromkeys(
        ("prompt", "self_speculation", "max_new_tokens", "benchmark", "top_k", "stop_strings", "stream")
    )
    own = write_yaml(tmp_path / "own.yaml", {"extends": str(path), "dataset": data, "temperature": 0.0, **off})
    LayerSkipEval(load_config(str(own)))
    for key, value in {"temperature": 1.0, "top_k": 1, "stop_tokens": [2], "prompt": "a"}.items():
        with pytest.raises(ValueError, match=rf"^{key}: .* is not honoured by this recipe: .* Set {key}=null"):
            LayerSkipEval(load_config(str(own), [f"{key}={value}"]))


def test_what_does_not_loop_is_compared_on_the_same_prompts():
    """Of three prompts one way loops on the first and the other on the second: the third is left."""
    loop, straight = [1, 2] * 20, list(range(40))
    outputs = {0: (loop, straight), 1: (straight, loop), 2: (straight, straight)}
    totals, seconds = (Totals(), Totals()), ((1.0, 3.0), (5.0, 1.0), (1.0, 2.0))
    for i, both in outputs.items():
        for of_way, mine, other, took in zip(totals, both, both[::-1], seconds[i], strict=True):
            of_way.add({i: mine}, GenerationStats(tokens=41, rows=1, decode_s=took), beside=[other])
    assert [of_way.compared.decode_s for of_way in totals] == [1.0, 2.0]
    assert [of_way.straight.decode_s for of_way in totals] == [5.0 + 1.0, 3.0 + 2.0]
    assert [of_way.looping for of_way in totals] == [1, 1]
