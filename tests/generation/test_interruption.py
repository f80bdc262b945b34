"""Ctrl-C and kills: what was generated is reported and kept."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torchtune.utils import get_logger

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.drafting.chain import ChainDrafter
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.generation.rows import Rows
from layerskip_recipes.generation.text.text_stream import TextStream, follow

pytestmark = pytest.mark.slow


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
        if self.speculation is not None:  # not of the comparison's plain decoding
            rounds.append(self.rows.prompts[0])
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


def test_answers_of_a_run_that_is_killed(path, tmp_path, monkeypatch):
    """Answers are written as they end, and the file of before is there until the end."""
    out = tmp_path / "out.jsonl"
    partial, seen = out.with_name("out.jsonl.partial"), []
    out.write_text("yesterday's")
    lines = ["a = 1; b = 2; c", "import os; x = 3", "a", "b"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    overrides = [f"prompt_file={tmp_path / 'prompts.jsonl'}", f"output_file={out}", "batch_size=2"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()

    def watched(self, new, keep=Generation._keep):
        seen.append((out.read_text(), partial.read_text().splitlines()))
        return keep(self, new)

    monkeypatch.setattr(Generation, "_keep", watched)
    recipe.generate()
    assert seen[0] == ("yesterday's", []) and {text for text, _ in seen} == {"yesterday's"}
    whole = out.read_text().splitlines()
    assert [json.loads(line)["index"] for line in whole] == [0, 1, 2, 3]
    assert 0 < len(seen[-1][1]) < 4 and set(seen[-1][1]) < set(whole) and not partial.exists()


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


def test_what_stop_strings_cut_is_not_counted_after_ctrl_c(path):
    """Of a round that gave three tokens one is kept."""
    recipe = LayerSkipGenerate(load_config(str(path)))
    tokens = recipe.tokenizer.encode("a = 1", add_bos=False, add_eos=False)
    text = recipe.tokenizer.decode(tokens[:1])

    class Interrupted:
        rows = Rows([[0]], None, 10, ())
        rows.add([tokens])
        generated, finished, in_row = rows.generated, rows.finished, rows.in_row
        stats = SimpleNamespace(tokens=len(tokens), decode_s=0.0)
        stop = Generation.stop

        def __iter__(self):
            yield [list(tokens)]
            raise KeyboardInterrupt

    generation = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        follow(generation, [TextStream(recipe.tokenizer, [], [text])])
    assert generation.finished == [True] and generation.stats.tokens == len(generation.generated[0]) == 1 < len(tokens)


def test_ctrl_c_leaves_no_draft_on_the_screen(path, capsys, monkeypatch):
    """It comes while a draft is verified: the screen ends with the accepted text, as the file has it."""
    out = path.parent / "out.jsonl"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    recipe = LayerSkipGenerate(load_config(str(path), ["stream=draft", f"output_file={out}"]))
    recipe.setup()
    rounds = []

    def interrupted(self, *args, verify=ChainDrafter.verify):
        rounds.append(1)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return verify(self, *args)

    monkeypatch.setattr(ChainDrafter, "verify", interrupted)
    recipe.generate()
    shown = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
    assert shown.count("\x1b[2m") == shown.count("\x1b8\x1b[J") == 3
    text = json.loads(out.read_text())["text"]
    assert text and re.sub(r" \x08\x1b7.*?\x1b8\x1b\[J", "", shown, flags=re.S).rstrip("\n") == text.rstrip("\n")


def test_ctrl_c_within_rows(path, tmp_path, monkeypatch, capsys):
    """It comes while the second answer is printed: both are whole, those under way are marked, the rest is missing."""
    out = tmp_path / "out.jsonl"
    overrides = ["prompt=[a, b, c, d]", "batch_size=2", "benchmark.compare=false"]
    expected = LayerSkipGenerate(load_config(str(path), [*overrides, f"output_file={tmp_path / 'whole.jsonl'}"]))
    expected.setup()
    expected.generate()
    whole = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    recipe = LayerSkipGenerate(load_config(str(path), [*overrides, f"output_file={out}"]))
    recipe.setup()
    calls = []

    def interrupted(i, answer, show=recipe._show):
        calls.append(i)
        if len(calls) == 2:
            raise KeyboardInterrupt
        show(i, answer)

    monkeypatch.setattr(recipe, "_show", interrupted)
    recipe.generate()
    lines = {line["index"]: line for line in map(json.loads, out.read_text().splitlines())}
    ended = [index for index, line in lines.items() if "interrupted" not in line]
    assert len(ended) >= 2 and [lines[index] for index in ended] == [whole[index] for index in ended]
    for index in set(lines) - set(ended):
        assert whole[index]["text"].startswith(lines[index]["text"])


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
