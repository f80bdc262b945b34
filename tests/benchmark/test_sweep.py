"""`layerskip_benchmark sweep=...`: which cells are measured, what is written, and going on after a stop.

The best of a sweep is compared with the best of all cells by a cost formula in the test.
"""

import csv
import dataclasses
import itertools
import json
import os

import pytest
from helpers.configs import benchmark_config, generate_config, make_checkpoint
from helpers.tiny import make_tiny
from omegaconf import OmegaConf

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.benchmark import sweep
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.benchmark.sweep import best_of, check_sweep, promise
from layerskip_recipes.benchmark.sweep_files import Cell, Journal, Measured
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.config import check_config
from layerskip_recipes.generation.drafting.section import self_speculation
from layerskip_recipes.generation.kernels.compiling import compiled_steps

L, STEP = 16, 0.016
# A layer takes 1 ms, a head too; a further position of a verification a tenth of that.
LAYER, HEAD, POSITION = 0.9e-3, 1e-3, 0.1e-3


def tokens_of(rate):
    return {e: [sum(rate(e) ** k for k in range(d + 1)) for d in range(1, 13)] for e in range(1, L)}


def cost(e, d):
    """Seconds of a draft step and of a verification."""
    return e * LAYER + HEAD, (L - e) * (LAYER + d * POSITION) + HEAD


def truth(cell, tokens, step_s=STEP):
    """What is measured, by the formulas; on a slower machine everything takes longer."""
    slower = step_s / STEP
    draft_s, verify_s = (slower * seconds for seconds in cost(*cell[:2]))
    count = tokens[cell.exit_layer][cell.num_speculations - 1]
    speedup = count * step_s / (cell.num_speculations * draft_s + verify_s + slower * 1e-4)
    rest = {"step_s": step_s, "draft_step_s": draft_s, "verify_s": verify_s, "rest_s": slower * 1e-4}
    return Measured([speedup], speedup / step_s, count, 0.5, cell.num_speculations, **rest, identical=None)


def test_a_promise_by_hand():
    tokens = {4: [1.8, 2.4, 2.8]}
    assert promise(Cell(4, 2), tokens, {}) == pytest.approx(1.1 * 2.4)  # a round costs a step at least
    seconds = {"step_s": 0.016, "draft_step_s": 0.006, "verify_s": 0.010, "rest_s": 0.001}
    known = Measured([1.0], 1.0, 1.0, 0.5, 1, **seconds, identical=None)
    # Three drafts of 6 ms, a verification of at least 10 ms, as of two positions, and 1 ms.
    assert promise(Cell(4, 3), tokens, {Cell(4, 1): known}) == pytest.approx(1.1 * 2.8 * 0.016 / 0.029)
    # Shorter than what is known: 1 of 3 positions more, 10 ms * 2 / 4, but no less than a step.
    assert promise(Cell(4, 1), tokens, {Cell(4, 3): known}) == pytest.approx(1.1 * 1.8)
    # Another exit, or a threshold, tells nothing of it.
    others = {Cell(5, 3): known, Cell(4, 3, 0.5): known}
    assert promise(Cell(4, 3), tokens, others) == pytest.approx(1.1 * 2.8)
    # With a threshold no more is drafted than accepted: 1.8 of 3.
    assert promise(Cell(4, 3, 0.5), tokens, {Cell(4, 3): known}) == pytest.approx(1.1 * 2.8 * 0.016 / 0.0188)


@pytest.mark.parametrize("rate", [lambda e: 0.3 + 0.04 * e, lambda e: 0.9, lambda e: e / L, lambda e: 0.05])
def test_pruning_keeps_the_best(rate, tmp_path, monkeypatch):
    """Against all cells by the formula, on a machine that gets slower and faster; and far from all are measured."""
    tokens, speeds = tokens_of(rate), itertools.cycle([1.0, 1.5, 0.7])
    cells = [Cell(e, d) for e in range(1, L) for d in (1, 2, 3, 4, 6, 8, 10, 12)]
    best = max(truth(cell, tokens).speedup for cell in cells)
    monkeypatch.setattr(sweep, "observe", lambda bench, temperature, longest: (tokens, STEP))
    monkeypatch.setattr(sweep, "measure", lambda bench, temperature, cell: truth(cell, tokens, STEP * next(speeds)))
    journals = {prune: Journal(tmp_path / f"{prune}.jsonl", {}) for prune in (True, False)}
    for prune, journal in journals.items():
        sweep._measure(None, 0.0, cells, prune, journal)
    found = journals[True].cells[0.0]
    assert found[best_of(found)].speedup == pytest.approx(best, rel=1e-9 if best > 1 else 0.2)
    assert len(found) < 0.75 * len(cells)
    assert journals[False].cells[0.0].keys() == set(cells)


def test_a_measurement_that_cannot_be_ends_no_sweep(tmp_path, monkeypatch, caplog):
    """The first cell is measured at ten times what it is: that is said, and the best one is found all the same."""
    tokens, calls = tokens_of(lambda e: 0.9), []
    cells = [Cell(e, d) for e in range(1, L) for d in (1, 2, 4)]

    def measure(bench, temperature, cell):
        calls.append(cell)
        found = truth(cell, tokens)
        return dataclasses.replace(found, speedups=[10 * x for x in found.speedups]) if len(calls) == 1 else found

    monkeypatch.setattr(sweep, "observe", lambda bench, temperature, longest: (tokens, STEP))
    monkeypatch.setattr(sweep, "measure", measure)
    journal = Journal(tmp_path / "sweep.jsonl", {})
    sweep._measure(None, 0.0, cells, True, journal)
    assert max(cells, key=lambda cell: truth(cell, tokens).speedup) in calls and 1 < len(calls) < len(cells)
    said = [line for line in caplog.messages if "is the most" in line]
    assert len(said) == 1 and said[0].startswith(calls[0].name)


def test_cells_that_were_not_asked_for_leave_none_out(tmp_path, monkeypatch):
    """A journal has a fast one, of a sweep before, from which the next best would not be measured."""
    tokens = tokens_of(lambda e: e / L)
    journal, asked = Journal(tmp_path / "sweep.jsonl", {}), [Cell(8, 2), Cell(8, 4)]
    journal.add(0.0, Cell(3, 6), truth(Cell(3, 6), tokens_of(lambda e: 0.99)))
    monkeypatch.setattr(sweep, "observe", lambda bench, temperature, longest: (tokens, STEP))
    monkeypatch.setattr(sweep, "measure", lambda bench, temperature, cell: truth(cell, tokens))
    fast = journal.cells[0.0][Cell(3, 6)].speedup
    sweep._measure(None, 0.0, asked, True, journal)
    found = {cell: known.speedup for cell, known in journal.cells[0.0].items() if cell in asked}
    assert found and max(found.values()) < fast / 1.2


def test_a_journal_is_read_again(tmp_path):
    path = tmp_path / "x" / "sweep.jsonl"
    journal = Journal(path, {"seed": 0, "prompt": ["a"]})
    first, second = truth(Cell(2, 3), tokens_of(lambda e: 0.5)), truth(Cell(3, 1), tokens_of(lambda e: 0.5))
    journal.add(0.0, Cell(2, 3), first)
    journal.add(0.8, Cell(3, 1, "auto"), second)
    expected = {0.0: {Cell(2, 3): first}, 0.8: {Cell(3, 1, "auto"): second}}
    assert Journal(path, {"seed": 0, "prompt": ["a"]}).cells == expected
    whole = path.read_text()
    path.write_text(whole[:-20])  # killed while it wrote
    again = Journal(path, {"seed": 0, "prompt": ["a"]})
    assert again.cells == {0.0: {Cell(2, 3): first}}
    again.add(0.8, Cell(3, 1, "auto"), second)
    assert path.read_text() == whole
    with pytest.raises(ValueError, match=r"^report_dir: .*sweep.jsonl' is a sweep with seed=0, and here it is 1"):
        Journal(path, {"seed": 1, "prompt": ["a"]})
    assert path.read_text() == whole
    for broken in ("{", "{}", "[]", '{"cell": [2, 3], "temperature": 0}', '{"cell": [1, 2, 3, 4], "temperature": 0}'):
        path.write_text(whole + broken + "\n")
        with pytest.raises(ValueError, match=r"^report_dir: line 4 of '.*sweep.jsonl' is none of a sweep"):
            Journal(path, {"seed": 0, "prompt": ["a"]})


@pytest.fixture
def path(tmp_path, tokenizer_folder):
    checkpoint = make_checkpoint(tmp_path / "model", tokenizer_folder)
    user = generate_config(tmp_path / "user", checkpoint)
    section = {"exit_layers": [1, 3], "num_speculations": [1, 4], "thresholds": [None, 0.5], "prune": False}
    return benchmark_config(
        tmp_path,
        checkpoint,
        sweep=section,
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
    return recipe.sweep()


def test_the_recipe(path, monkeypatch, capsys):
    """Stopped after three cells, it goes on with the other five; and then nothing is left to measure."""
    folder, measured, real = path.parent / "report", [], sweep.measure

    def until_three(bench, temperature, cell):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(cell)
        return real(bench, temperature, cell)

    monkeypatch.setattr(sweep, "measure", until_three)
    report = run(path)
    assert report["interrupted"] is True and sum(row["speedup"] is not None for row in report["cells"]) == 3
    assert not (folder / "tuned.yaml").exists()
    monkeypatch.setattr(sweep, "measure", lambda *given: measured.append(given[2]) or real(*given))
    report = run(path)
    every = {Cell(e, d, t) for e in (1, 3) for d in (1, 4) for t in (None, 0.5)}
    assert len(measured) == 8 and set(measured) == every and report["interrupted"] is False
    table = {Cell(row["exit_layer"], row["num_speculations"], row["threshold"]): row for row in report["cells"]}
    assert table.keys() == every
    for cell, row in table.items():
        assert row["identical"] is True and row["speedup_min"] <= row["speedup"] <= row["speedup_max"]
        assert row["tokens_per_round"] == pytest.approx(1 + row["acceptance_rate"] * row["drafted_per_round"])
        assert row["drafted_per_round"] <= cell.num_speculations
    with (folder / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["speedup"]) for line in lines] == [row["speedup"] for row in report["cells"]]
    assert json.loads((folder / "sweep.json").read_text())["cells"] == report["cells"]
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    fastest = max(table, key=lambda cell: table[cell]["speedup"])
    cfg = load_config(str(folder / "tuned.yaml"))
    check_config(cfg)
    if table[fastest]["speedup"] > 1:
        assert dict(cfg.self_speculation) == self_speculation(**fastest.section)
    else:
        assert cfg.self_speculation is None
    assert f"{fastest.name} at {table[fastest]['speedup']:.2f}x is the fastest of 8" in capsys.readouterr().out
    run(path, "sweep.num_speculations=[4]")  # another part of the same sweep
    assert len(measured) == 8
    with pytest.raises(ValueError, match="is a sweep with max_new_tokens=16"):
        LayerSkipBenchmark(load_config(str(path), ["max_new_tokens=17"]))
    run(path, "sweep.num_speculations=[4]", "sweep.exit_layers=[1]", "temperatures=[0.0,0.8]")
    assert [cell[:2] for cell in measured[8:]] == [(1, 4), (1, 4)]  # at the other temperature
    os.utime(path.parent / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="is a sweep with size and time of the weights="):
        LayerSkipBenchmark(load_config(str(path)))


def test_batches_and_texts_that_end(path):
    """Rows of different lengths together, whose texts end early; and one token is nothing to draft from."""
    asked = ["prompt=[def main(, import os, class, x]", "batch_size=2", "sweep.thresholds=[null]", "tune_extends=null"]
    ends = path.parent / "model" / "generation_config.json"
    ends.write_text(json.dumps({"eos_token_id": list(range(0, 300, 5))}))
    report = run(path, *asked)
    assert all(row["identical"] for row in report["cells"])
    ends.write_text(json.dumps({"eos_token_id": list(range(300))}))
    with pytest.raises(ValueError, match=r"^max_new_tokens: every output ended with its first token"):
        run(path, f"report_dir={path.parent / 'other'}")


def test_lengths_that_nobody_gave_fit_the_new_tokens(path):
    """A text of 8 tokens has room for 7 drafts behind its first one; lengths that were given are refused."""
    model = layerskip_decoder(make_tiny())
    assert check_sweep(OmegaConf.create({}), model, 8)["num_speculations"] == [1, 2, 3, 4, 6]
    assert check_sweep(OmegaConf.create({}), model, 128)["num_speculations"] == [1, 2, 3, 4, 6, 8, 10, 12]
    with pytest.raises(ValueError, match=r"^sweep.num_speculations: 8 .*1 to 7"):
        check_sweep(OmegaConf.create({"num_speculations": [8]}), model, 8)
    LayerSkipBenchmark(load_config(str(path), ["sweep={}", "max_new_tokens=8", "sweep.num_speculations=null"]))


def test_a_complete_sweep_says_that_it_was_compiled(path, monkeypatch):
    """Nothing is left to measure, so no step is compiled; where compiling failed it says so."""
    monkeypatch.setattr(sweep, "_measure", lambda *_: None)
    recipe = LayerSkipBenchmark(load_config(str(path), ["compile=true"]))
    recipe.setup()
    assert recipe.sweep()["compiled"] is True
    compiled_steps(recipe.model).failed = True
    assert recipe.sweep()["compiled"] is False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.exit_layers=[1,9]"], r"^sweep.exit_layers: 9 .*1\.\.4"),
        (["sweep.exit_layers=[]"], r"^sweep.exit_layers: \[\] is no list"),
        (["sweep.num_speculations=4"], "^sweep.num_speculations: 4 is no list"),
        (["sweep.num_speculations=[4,4]"], "^sweep.num_speculations: .*different"),
        (["sweep.num_speculations=[13]"], "^sweep.num_speculations: 13 .*12"),
        (["sweep.thresholds=[1.5]"], "^sweep.thresholds: 1.5 .*0 to 1"),
        (["sweep.prune=3"], "^sweep.prune: 3"),
        (["sweep.exits=[1]"], "^sweep.exits: .*Nearest: exit_layers"),
        (["sweep=3"], "^sweep: 3"),
        (["tune=true"], "^tune: it cannot go with sweep"),
        (["tune_extends=nowhere"], "^tune_extends: 'nowhere'"),
        (["sweep.thresholds=[0,0.0]"], "^sweep.thresholds: .*different"),
        (["temperatures=[0,0.0]"], "^temperatures: .*different"),
        (["tune_extends=null", "tune_file=x.yaml"], "^tune_file: x.yaml needs tune_extends"),
        (["sweep=null"], "^tune_extends: .* needs tune or sweep"),
        (["tune_file=${tune_extends}"], "^tune_extends: .* is the file that is written"),
        (["tune_file=benchmark.yaml/x/y.yaml"], "^tune_file: 'benchmark.yaml/x' cannot be written"),
        (["metrics=[rouge1]"], r"^metrics: \['rouge1'\] is not for a sweep"),
        (["repetition_penalty=1.2", "peers=[]"], "^repetition_penalty: 1.2 is not allowed with sweep"),
    ],
)
def test_mistakes(overrides, message, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    with pytest.raises(ValueError, match=message):
        LayerSkipBenchmark(load_config(str(path), overrides))
    assert not (path.parent / "report").exists()
