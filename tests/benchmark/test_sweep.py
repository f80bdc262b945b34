"""`layerskip_benchmark sweep=...`: which pairs are measured, and what is written."""

import csv
import json

import pytest
from helpers.configs import benchmark_config, generate_config, make_checkpoint
from helpers.tiny import make_tiny

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.benchmark.measuring import Turns
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.benchmark.sweep import Pair, Sweep
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.config import GenerateConfig

pytestmark = pytest.mark.slow


@pytest.fixture
def path(tmp_path, tokenizer_folder):
    checkpoint = make_checkpoint(tmp_path / "model", tokenizer_folder)
    user = generate_config(tmp_path / "user", checkpoint)
    return benchmark_config(
        tmp_path,
        checkpoint,
        sweep={"exit_layers": [1, 3], "num_speculations": [1, 4]},
        prompt="def main(",
        tune_extends=str(user),
        max_new_tokens=16,
        temperatures=[0.0],
        repeats=2,
        peers=["torchtune"],
    )


def run(path, *overrides):
    recipe = LayerSkipBenchmark(load_config(str(path), list(overrides)))
    recipe.setup()
    return recipe.benchmark()


def test_the_recipe(path, capsys):
    """Every pair, in place of variants and peers: the report, the CSV, the picture, and the config of the fastest."""
    folder, report = path.parent / "report", run(path)
    pairs = [Pair(e, d) for e in (1, 3) for d in (1, 4)]
    assert [row["name"] for row in report["results"]] == ["baseline", *(pair.name for pair in pairs)]
    assert report["sweep"] is True and report["interrupted"] is False
    table = dict(zip(pairs, report["results"][1:], strict=True))
    for pair, row in table.items():
        assert row["identical"] is True and row["outputs"] == 2
        assert row["tokens_per_round"] == pytest.approx(1 + row["acceptance_rate"] * row["drafted_per_round"])
        assert row["drafted_per_round"] <= pair.num_speculations
    with (folder / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [Pair(int(line["exit_layer"]), int(line["num_speculations"])) for line in lines] == pairs
    for line, row in zip(lines, table.values(), strict=True):
        spread = row["speedup"]
        assert [float(line[key]) for key in ("speedup", "speedup_min", "speedup_max")] == [*spread.values()]
        assert float(line["acceptance_rate"]) == row["acceptance_rate"]
    assert json.loads((folder / "sweep.json").read_text())["results"] == json.loads(json.dumps(report["results"]))
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert {file.name for file in folder.iterdir()} == {
        *(f"sweep.{end}" for end in ("csv", "json", "md", "png")),
        "tuned.yaml",
    }
    fastest = max(table, key=lambda pair: table[pair]["speedup"]["median"])
    cfg = GenerateConfig.load(load_config(str(folder / "tuned.yaml")))
    assert cfg.self_speculation == (fastest.variant if table[fastest]["speedup"]["median"] > 1 else None)
    assert "fastest: " in capsys.readouterr().out


def test_what_was_measured_before_ctrl_c_is_written(path, monkeypatch):
    """In the second repeat; no config is chosen by half of the measurements."""
    calls, whole = [], Turns.decode

    def until(self, *args):
        calls.append(args)
        if len(calls) > 5 * (2 + 1) + 2:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(Turns, "decode", until)
    report = run(path)
    assert report["interrupted"] is True
    assert {(row["outputs"], row["identical"]) for row in report["results"]} == {(1, True)}
    assert (path.parent / "report" / "sweep.csv").exists() and not (path.parent / "report" / "tuned.yaml").exists()


def test_batches_and_texts_that_end(path):
    """Rows of different lengths together, whose texts end early; and one token is nothing to draft from."""
    asked = ["prompt=[def main(, import os, class, x]", "batch_size=2"]
    ends = path.parent / "model" / "generation_config.json"
    ends.write_text(json.dumps({"eos_token_id": list(range(0, 300, 5))}))
    report = run(path, *asked, "tune_extends=null")
    assert all(row["identical"] for row in report["results"])
    ends.write_text(json.dumps({"eos_token_id": list(range(300))}))
    with pytest.raises(ValueError, match=r"^max_new_tokens: every output ended with its first token"):
        run(path, "prompt=[def main(, import os]")


def test_pairs_that_nobody_gave_and_values_given_twice():
    model = layerskip_decoder(make_tiny())
    pairs = Sweep().pairs(model)
    assert sorted({pair.num_speculations for pair in pairs}) == [1, 2, 3, 4, 6, 8, 10, 12]
    assert {pair.exit_layer for pair in pairs} == {1, 2, 3, 4, 5}
    assert Sweep(exit_layers=[2, 2], num_speculations=[4, 4]).pairs(model) == [Pair(2, 4)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.exit_layers=[1,9]"], r"^sweep.exit_layers: 9 .*1\.\.4"),
        (["sweep.exit_layers=[]"], r"^sweep.exit_layers: \[\] is not allowed. Allowed: a list of integers"),
        (["sweep.num_speculations=4"], "^sweep.num_speculations: 4 is not allowed. Allowed: a list of integers"),
        (["sweep.num_speculations=[13]"], r"^sweep.num_speculations: \[13\] .*integers of 1 to 12 "),
        (["sweep.exits=[1]"], "^sweep.exits: .*Nearest: exit_layers"),
        (["sweep=3"], "^sweep: 3"),
        (["tune=true"], "^tune: it cannot go with sweep"),
        (["tune_extends=nowhere"], "^tune_extends: 'nowhere'"),
        (["tune_extends=null", "tune_file=x.yaml"], "^tune_file: 'x.yaml' needs tune_extends"),
        (["tune_file=${tune_extends}"], "^tune_extends: .* is the file that is written"),
        (["tune_file=benchmark.yaml/x/y.yaml"], "^tune_file: 'benchmark.yaml/x' cannot be written"),
    ],
)
def test_mistakes(overrides, message, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    with pytest.raises(ValueError, match=message):
        LayerSkipBenchmark(load_config(str(path), overrides))
    assert not (path.parent / "report").exists()
