"""`layerskip results`: the page has what the commands measured, and runs only those whose result is not there.

The commands' results come from the recipes themselves, run here on a tiny model; the page's numbers are looked up in
them.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest
from helpers.configs import benchmark_config, generate_config, make_checkpoint

from layerskip_recipes.benchmark import results
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.benchmark.results import write_results
from layerskip_recipes.config.loading import load_config

COST = {
    "figures": {"ours": {"seconds": 1.25, "peak_gb": 2.5}, "torchtune": {"seconds": 1.5, "peak_gb": 3.75}},
    "ratios": {"last layer / torchtune's, time": 0.83},
    **{"batch": 8, "seq_len": 256, "layers": "0::4"},
}
EXITS = {"exits": {"2": {"loss": 3.125, "accuracy": 0.25, "agreement": 0.375, "accepted_length": 0.75}}}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tokenizer_folder):
    """What the benchmark's three commands write, by their report_dir."""
    folder = tmp_path_factory.mktemp("measured")
    checkpoint = make_checkpoint(folder / "model", tokenizer_folder)
    user = generate_config(folder / "user", checkpoint)
    few = {"max_new_tokens": 16, "temperatures": [0.0], "repeats": 1, "prompt": "def main("}
    extra = {"benchmark": {}, "tune": {"tune": True, "tune_extends": str(user)}}
    extra["sweep"] = {"sweep": {"exit_layers": [1, 2], "num_speculations": [2], "prune": False}}
    for name, settings in extra.items():
        report = {"report_dir": str(folder / name), "picture": str(folder / name / "picture.png")}
        path = benchmark_config(folder / f"{name}_config", checkpoint, **few, **settings, **report)
        recipe = LayerSkipBenchmark(load_config(str(path)))
        recipe.setup()
        if name == "tune":
            recipe.tune()
        recipe.sweep() if name == "sweep" else recipe.benchmark()
    return folder


@pytest.fixture
def commands(measured, tmp_path, monkeypatch):
    """The commands that were run; they write what was measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    ran = []

    def run(command, **kwargs):
        ran.append(command)
        values = dict(word.split("=", 1) for word in command if "=" in word)
        if "layerskip_finetune" in command:
            Path(values["output_dir"], "epoch_0").mkdir(parents=True)
            Path(values["output_dir"], "epoch_0", "model.safetensors").write_text("weights")
        elif "layerskip_eval" in command:
            Path(values["report"]).write_text(json.dumps(EXITS))
        elif "layerskip_benchmark" in command:
            target = Path(values["report_dir"])
            target.mkdir(parents=True, exist_ok=True)
            for file in (measured / target.name.replace("batch", "benchmark")).iterdir():
                (target / file.name).write_bytes(file.read_bytes())
        if "picture" in values:
            Path(values["picture"]).write_bytes(b"a picture")
        return subprocess.CompletedProcess(command, 0, f"a table\n{json.dumps(COST)}\n", "")

    monkeypatch.setattr(results.subprocess, "run", run)
    return ran


def kinds(commands: list[list[str]]) -> list[str]:
    return [command[0] if command[0] == "layerskip" else command[2].removeprefix("layerskip_") for command in commands]


def test_the_page(commands, measured, tmp_path):
    page = write_results("docs/results.md", ["quickstart"])
    assert kinds(commands) == ["finetune", "layerskip", "eval", *["benchmark"] * 4]
    text = page.read_text()
    assert "layerskip results docs/results.md quickstart" in text
    assert "| ours | 1.250 | 2.50 |" in text and "- last layer / torchtune's, time: 0.83" in text
    assert "| 2 | 3.125 | 0.250 | 0.375 | 0.75 |" in text
    benchmark = json.loads((measured / "benchmark" / "benchmark.json").read_text())
    for row in benchmark["results"]:
        assert f"| {row['name']} | {row['tokens_per_second']['median']:.1f} |" in text
        if row["acceptance_rate"]:
            assert f" | {row['acceptance_rate']:.2f} | {row['tokens_per_round']:.2f} | " in text
    assert "| acceptance | tokens/round | ideal |" in text
    cells = json.loads((measured / "sweep" / "sweep.json").read_text())["cells"]
    best = max(cells, key=lambda cell: cell["speedup"])
    assert f"Fastest: exit {best['exit_layer']} with drafts of 2, {best['speedup']:.2f}x." in text
    tuned = [r for r in json.loads((measured / "tune" / "tune.json").read_text())["results"] if r["kind"] != "baseline"]
    for row in tuned:
        predicted = f"{row['predicted_speedup']:.2f}" if row["predicted_speedup"] else "-"
        assert f"| {row['name']} | {predicted} | {row['speedup']['median']:.2f} |" in text
    assert all(row["predicted_speedup"] for row in tuned if not row["name"].endswith("auto"))
    fastest = max(tuned, key=lambda row: row["speedup"]["median"])["speedup"]["median"]
    assert f"{fastest / best['speedup']:.2f} of it." in text
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / "docs" / picture).read_bytes() == b"a picture"
    assert str(tmp_path) not in text  # paths of this machine help nobody


def test_what_was_measured_is_not_measured_again(commands, tmp_path):
    """As long as it is whole, and of the same command and weights."""
    text = write_results("docs/results.md", ["quickstart"]).read_text()
    figures = tmp_path / "results" / "quickstart_figures"

    def again(*models: str, page: str = "docs/results.md") -> list[str]:
        del commands[:]
        write_results(page, models or ["quickstart"])
        return kinds(commands)

    assert again() == [] and (tmp_path / "docs/results.md").read_text() == text
    assert again(page="docs/other.md") == [] and (tmp_path / "docs/other_quickstart_eval.png").exists()
    (figures / "exits.json").unlink()
    assert again() == ["eval"]
    sweep = figures / "sweep" / "sweep.json"
    sweep.write_text(json.dumps(json.loads(sweep.read_text()) | {"interrupted": True}))
    assert again() == ["benchmark"] and "sweep={}" in commands[0]
    assert again("quickstart=elsewhere") == ["finetune", "layerskip", "eval", *["benchmark"] * 4]
    (tmp_path / "elsewhere/epoch_0/model.safetensors").unlink()  # trained anew
    assert again("quickstart=elsewhere") == ["layerskip", "eval", *["benchmark"] * 4]


def test_a_sweep_goes_on_only_with_the_same_weights(commands, tmp_path, monkeypatch):
    """Its journal is there when an interrupted page is made again, and is not when the model was trained anew."""
    write_results("docs/results.md", ["quickstart"])
    folder = tmp_path / "results" / "quickstart_figures" / "sweep"
    journal, seen, run = folder / "sweep.jsonl", [], results.subprocess.run

    def watched(command, **kwargs):
        if "sweep={}" in command:
            seen.append(journal.exists())
        return run(command, **kwargs)

    monkeypatch.setattr(results.subprocess, "run", watched)
    for trained_anew in (False, True):
        journal.write_text("cells\n")
        (folder / "sweep.json").unlink()
        if trained_anew:
            (tmp_path / "results/quickstart/epoch_0/model.safetensors").unlink()
        write_results("docs/results.md", ["quickstart"])
    assert seen == [True, False]


def test_what_was_written_by_hand_stays(commands, tmp_path):
    page = tmp_path / "docs/results.md"
    write_results("docs/results.md", ["quickstart"])
    figures, mark = page.read_text(), results.BY_HAND
    assert figures.endswith(f"\n\n{mark}\n")
    page.write_text(f"old figures\n\n{mark}\n\n## What these figures say\n\nLittle.\n")
    write_results("docs/results.md", ["quickstart"])
    assert page.read_text() == f"{figures}\n## What these figures say\n\nLittle.\n"


def test_no_other_file_is_overwritten(commands, tmp_path):
    page = tmp_path / "notes.md"
    page.write_text("mine\n")
    with pytest.raises(ValueError, match=r"^results: 'notes.md' is there and no page of ours"):
        write_results("notes.md", ["quickstart"])
    assert page.read_text() == "mine\n" and not commands


def test_batches_are_measured_with_the_chain_only():
    """A variant that the config gets must be added to those that are left out."""
    left_out = {override.removeprefix("variants.").removesuffix("=null") for override in results.CHAIN_ONLY}
    assert {*load_config("quickstart/benchmark").variants} == {"chain"} | left_out


def test_a_part_that_fails_says_so(commands, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "ValueError: device: 'cuda' is not there\n")
    monkeypatch.setattr(results.subprocess, "run", lambda *args, **kwargs: failed)
    for command in ("tune run layerskip_finetune", "layerskip cost"):
        with pytest.raises(ValueError, match=rf"results: '{command} .* failed: .*'cuda' is not there"):
            write_results("docs/results.md", ["quickstart"])
        (tmp_path / "results/quickstart/epoch_0").mkdir(parents=True, exist_ok=True)
    assert not (tmp_path / "docs/results.md").exists()


@pytest.mark.parametrize(
    ("file", "models", "message"),
    [
        ("docs/results.md", ["llama"], "^results: 'llama' is unknown. Allowed: quickstart, smollm2"),
        ("docs/results.md", ["smollm2=/nowhere"], "^results: smollm2 needs /nowhere/epoch_7. First: tune run"),
        ("nowhere/results.md", ["quickstart"], "^results: 'nowhere' is no folder"),
        ("docs", ["quickstart"], "^results: 'docs' is a folder. Allowed: a file; for example docs/results.md$"),
    ],
)
def test_mistakes(file, models, message, commands):
    with pytest.raises(ValueError, match=message):
        write_results(file, models)
    assert not commands
