"""Ctrl-C and kills: what was generated is reported and kept."""

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import recipes
from helpers.commands import run_forks
from helpers.json_lines import write_lines
from torchtune.utils import get_logger

from layerskip_recipes.cli.recipes import generate
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.recipe import LayerSkipGenerate

pytestmark = pytest.mark.slow
ready = functools.partial(recipes.ready, LayerSkipGenerate)


@pytest.mark.parametrize("compare", [False, True])
def test_ctrl_c_within_a_text_keeps_it_as_far_as_it_came(path, compare, monkeypatch, capsys):
    """In the second of three prompts, after two rounds; in a comparison it has no counterpart, and stays out."""
    out = path.parent / "out.jsonl"
    recipe = ready(path, "prompt=[a, b, c]", f"output_file={out}", f"benchmark.compare={str(compare).lower()}")
    rounds = []

    def interrupted(self, round_=Generation._round):
        if self.drafters.drafters:  # not of the comparison's plain decoding
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


def test_answers_are_written_as_they_end_and_replace_the_old_file_last(path, tmp_path, monkeypatch):
    """Answers are written as they end, and the file of before is there until the end."""
    out = tmp_path / "out.jsonl"
    partial, seen = out.with_name("out.jsonl.partial"), []
    out.write_text("yesterday's")
    lines = [{"prompt": text} for text in ("a = 1; b = 2; c", "import os; x = 3", "a", "b")]
    file = write_lines(tmp_path / "prompts.jsonl", lines)
    recipe = ready(path, f"prompt_file={file}", f"output_file={out}", "batch_size=2")

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
            ready(path, f"output_file={out}").generate()
    assert sorted(file.name for file in tmp_path.glob("out.jsonl.*")) == ["out.jsonl.partial.1", "out.jsonl.partial.2"]
    assert [Path(f"{out}.partial.{n}").read_text() for n in (1, 2)] == ["first", "second"]
    assert f"{out}.partial.2" in caplog.messages[-1]


def test_ctrl_c_in_a_batch_keeps_whole_answers_and_marks_those_under_way(path, tmp_path, monkeypatch):
    """It comes while the second answer is printed: both are whole, those under way are marked, the rest is missing."""
    settings, calls = ["prompt=[a, b, c, d]", "batch_size=2", "benchmark.compare=false"], []
    ready(path, *settings, f"output_file={tmp_path / 'whole.jsonl'}").generate()
    recipe = ready(path, *settings, f"output_file={tmp_path / 'out.jsonl'}")

    def interrupted(i, answer, show=recipe._show):
        calls.append(i)
        if len(calls) == 2:
            raise KeyboardInterrupt
        show(i, answer)

    monkeypatch.setattr(recipe, "_show", interrupted)
    recipe.generate()
    files = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    whole, lines = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    ended = [line for line in lines if "interrupted" not in line]
    assert len(ended) >= 2 and ended == [whole[line["index"]] for line in ended]
    assert all(whole[line["index"]]["text"].startswith(line["text"]) for line in lines)


def test_ctrl_c_ends_the_command_with_the_report_and_status_130(path, tmp_path):
    (tmp_path / "many.jsonl").write_text('{"prompt": "def main("}\n' * 20_000)
    settings = ["prompt_file=many.jsonl", "output_file=out.jsonl", "max_new_tokens=64"]

    def interrupt(answers=Path("out.jsonl.partial")):
        while not answers.exists() or answers.read_text().count("\n") < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    def command():
        threading.Thread(target=interrupt, daemon=True).start()
        sys.argv = ["layerskip_generate", "--config", str(path), *settings]
        generate()

    (done,) = run_forks(command, tmp_path, [os.environ])
    assert done.returncode == 130, done.stderr[-2000:]
    assert 2 <= json.loads(done.stdout.splitlines()[-1])["prompts"] < 20_000
    assert done.stderr.count("interrupted") == 1 and "Traceback" not in done.stderr
