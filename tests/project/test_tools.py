"""The scripts in tools/ run: the training cost on a tiny model, the results page on commands of the test's own."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from helpers import forks
from helpers.tools import load

# ---- training_cost.py ----


@pytest.mark.slow
def test_training_cost_compares_ours_with_torchtunes(monkeypatch, capsys):
    script, started = load("training_cost"), []

    def run(command, **kwargs):
        started.append(command)
        return forks.run(command[1:], Path.cwd(), [os.environ])[0]

    monkeypatch.setattr(script.subprocess, "run", run)
    options = ["--repeats", "1", "--steps", "1", "--batch", "1", "--seq-len", "16", "--prob", "0.5"]
    script.main(["quickstart/finetune", "model.num_layers=3", "--exits", "1", *options])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = report["figures"]
    assert len(started) == 6 and set(figures) == set(script.METHODS)
    assert all(row["seconds"] > 0 and row["peak_gb"] >= row["before_gb"] > 0 for row in figures.values())
    time = figures["ours, exits"]["seconds"] / figures["torchtune, exits"]["seconds"]
    assert report["ratios"]["exits / torchtune's exits, time"] == pytest.approx(time)


# ---- results_page.py ----

SPEED = {"median": 2.0, "min": 1.5, "max": 2.5}
ROW = {
    **dict.fromkeys(("setting", "ideal_speedup", "engine_efficiency", "speedup_not_looping", "identical")),
    **{"answer_tokens_per_second": SPEED, "answer_speedup": SPEED},
    **{"temperature": 0.0, "kind": "variant", "name": "exit3_draft5", "tokens_per_second": SPEED, "speedup": SPEED},
    **{"looping_outputs": 0, "outputs": 8, "acceptance_rate": 0.75, "tokens_per_round": 3.5},
}
REPORT = {
    **{"device": "a processor", "threads": 2, "memory_bandwidth": 2e10, "versions": {"torch": "2.13"}},
    **{"date": "today", "config": {"dtype": "fp32"}, "prompts": 8, "prompt_tokens": 9.5, "max_new_tokens": 128},
    **{"batch_size": 1, "repeats": 3, "compiled": True, "not_compiled": [], "interrupted": False, "results": [ROW]},
    "peers_left_out": {"transformers": "not installed"},
}
LINES = [
    "a processor (2 threads, 20.0 GB/s), fp32, compiled, batch 1. 8 prompts of 10 tokens on average, 128 new tokens, "
    "3 repeats. torch 2.13. today.",
    "transformers is left out (not installed).",
    f"| exit3_draft5 {2 * '| 2.0 (1.5-2.5) | 2.00 (1.50-2.50) '}| - | 0 of 8 | 0.75 | 3.50 | - | - | - |",
]
NAMES = ("one", "two")


@pytest.fixture
def page(tmp_path):
    """A page with two blocks; the commands print where the report and the picture are."""
    blocks = []
    for name in NAMES:
        document, picture = tmp_path / f"{name}.json", tmp_path / f"{name}.png"
        document.write_text(json.dumps(REPORT))
        picture.write_bytes(b"a picture")
        printed = f"a table\n{json.dumps({'json': str(document), 'picture': str(picture)})}"
        command = shlex.join([sys.executable, "-c", f"print({printed!r})"])
        blocks.append(f"Before {name}.\n\n<!-- run {name}: {command} -->\n<!-- end -->\n\nAfter {name}.\n")
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text("# Results\n\n" + "\n".join(blocks))
    return path


def test_the_page_gets_the_figures_of_its_commands(page):
    load("results_page").main([str(page)])
    text = page.read_text()
    for name in NAMES:
        block = text.partition(f"Before {name}.")[2].partition(f"After {name}.")[0]
        assert all(line in block for line in LINES), block
        assert f"\n    {sys.executable} -c " in block and block.rstrip().endswith("<!-- end -->")
        assert f"![{name}](page_{name}.png)" in text
        assert page.with_name(f"page_{name}.png").read_bytes() == b"a picture"


def test_a_page_is_updated_in_place(page, tmp_path):
    script = load("results_page")
    script.main([str(page)])
    page.write_text(text := page.read_text() + "\nBy hand.\n")
    (tmp_path / "one.json").write_text(json.dumps(REPORT | {"prompts": 99}))
    script.main([str(page)])
    assert text.count("8 prompts of") == 2 and page.read_text() == text.replace("8 prompts of", "99 prompts of", 1)
