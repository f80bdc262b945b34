"""The benchmark recipe: its report against the raw numbers in it, and Ctrl-C.

No speed is asserted: only that what is reported follows from what was measured.
"""

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.commands import run_tune
from helpers.configs import benchmark_config, generate_config
from helpers.json_lines import write_lines
from helpers.recipes import run_benchmark as run
from helpers.recipes import run_generate

from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.measuring import Run, Turns
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.benchmark.report import figures
from layerskip_recipes.cli import recipes as cli
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.accounts import Accounts
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.report import draft_figures
from layerskip_recipes.generation.stats import GenerationStats

pytestmark = pytest.mark.slow

METHODS = ["baseline", "chain", "short"]
PREDICTION = "argument):\n    import sys\n    return sys.path"


@pytest.fixture
def path(tmp_path, checkpoint) -> Path:
    return benchmark_config(tmp_path, checkpoint)


@pytest.fixture(scope="module")
def report(tmp_path_factory, checkpoint) -> dict:
    """Of a real `tune run`; `folder` is where it ran, `stdout` what it printed."""
    folder = tmp_path_factory.mktemp("run")
    path = benchmark_config(folder, checkpoint)
    ran = run_tune("run", "layerskip_benchmark", "--config", str(path), "seed=3", cwd=folder)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((folder / "report/benchmark.json").read_text()) | {"folder": folder, "stdout": ran.stdout}


def rows(report: dict, temperature: float) -> dict[str, dict]:
    return {row["name"]: row for row in report["results"] if row["temperature"] == temperature}


def test_the_printed_table_is_the_file_and_has_each_method(report):
    folder = report["folder"] / "report"
    files = {"json": "benchmark.json", "markdown": "benchmark.md", "picture": "benchmark.png"}
    assert {p.name for p in folder.iterdir()} == {*files.values()}
    assert (folder / "benchmark.png").read_bytes()[:4] == b"\x89PNG"
    table = (folder / "benchmark.md").read_text()
    printed, _, last = report["stdout"].rstrip().rpartition("\n")
    assert printed.strip() == table.strip()
    assert json.loads(last) == {kind: str(folder / name) for kind, name in files.items()}
    assert len(re.findall("^Temperature", table, flags=re.M)) == 2
    for name in METHODS:
        assert len(re.findall(rf"^\| {name}[ ,]", table, flags=re.M)) == 2, name


def test_the_report_names_command_versions_and_machine(report):
    assert report["command"].startswith("tune run layerskip_benchmark --config ") and "seed=3" in report["command"]
    assert torch.__version__.startswith(report["versions"]["torch"])
    assert {"python", "torchtune", "torchao"} <= {*report["versions"]}
    assert report["device"] and report["threads"] >= 1 and report["memory_bandwidth"] > 1e8
    assert (report["prompts"], report["batch_size"], report["repeats"], report["max_new_tokens"]) == (2, 1, 2, 16)
    assert report["compiled"] is report["interrupted"] is False
    assert report["config"]["variants"]["chain"] == {"exit_layer": 2, "num_speculations": 3}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_figures_follow_from_the_raw_numbers(report, temperature):
    """Rates and speed-ups from tokens and seconds of each repeat; efficiency from acceptance and the draft's cost."""
    table = rows(report, temperature)
    assert list(table) == METHODS
    base = table["baseline"]
    for row in table.values():
        assert row["outputs"] == 4 and len(row["per_repeat"]) == 2 and row["identical"] is True
        rates = [r["decoded_tokens"] / r["decode_s"] for r in row["per_repeat"]]
        base_rates = [r["decoded_tokens"] / r["decode_s"] for r in base["per_repeat"]]
        ratios = [ours / theirs for ours, theirs in zip(rates, base_rates, strict=True)]
        for key, values in {"tokens_per_second": rates, "speedup": ratios}.items():
            expected = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            assert row[key] == pytest.approx(expected)
        assert row["prefill_s"] > 0
    for name in ("chain", "short"):
        row = table[name]
        assert row["acceptance_rate"] == row["accepted"] / row["drafted"]
        assert row["drafted_per_round"] == row["drafted"] / row["rounds"]
        assert {*row["rounds_by_kind"]} == {"plain", "chain"} and sum(row["rounds_by_kind"].values()) == row["rounds"]
        assert row["tokens_per_round"] == pytest.approx(row["accepted"] / row["rounds"] + 1)
        cost = row["draft_s_per_round"] / row["draft_steps_per_round"] / base["round_s"]
        assert row["draft_cost"] == pytest.approx(cost)
        steps, d = row["draft_steps_per_round"], row["drafted_per_round"]
        assert row["ideal_speedup"] == pytest.approx((row["acceptance_rate"] * d + 1) / (steps * cost + 1))
        assert row["engine_efficiency"] == pytest.approx(row["speedup"]["median"] / row["ideal_speedup"])
        phases = sum(row[f"{phase}_s_per_round"] for phase in ("draft", "verify", "rest"))
        assert row["round_s"] == pytest.approx(phases)
        moved = row["bytes_per_token"] * row["tokens_per_second"]["median"]
        assert row["share_of_memory_bandwidth"] == pytest.approx(moved / report["memory_bandwidth"])
    assert base["drafted"] == 0 and base["engine_efficiency"] is None and base["compile_s"] == 0


@pytest.mark.clock
@pytest.mark.parametrize("cost", [1.0, 2.5])
def test_a_variant_drafts_where_generation_does(cost, path, tmp_path, checkpoint, monkeypatch):
    """With the same settings both commands have the same rounds, whether drafts pay or not. The cost replaces times.
    Each prompt has a prediction."""
    monkeypatch.setattr(DraftRule, "cost", lambda self, kind: cost)
    monkeypatch.setattr(Accounts, "round_s", 1.0)
    settings = {"exit_layer": 2, "num_speculations": 3, "prompt_lookup": 2}
    predicted = [{"prompt": "def main(", "prediction": PREDICTION}, {"prompt": "import os", "prediction": PREDICTION}]
    compares = {"prompt": predicted, "benchmark": {"compare": True}, "compile": False}
    config = generate_config(tmp_path, checkpoint, max_new_tokens=48, self_speculation=settings, **compares)
    _, generated = run_generate(config)
    variants = ", ".join(f"{key}: {value}" for key, value in settings.items())
    given = ["temperatures=[0.0]", "max_new_tokens=48", "repeats=1", "picture=null", f"prompt={json.dumps(predicted)}"]
    _, measured = run(path, *given, f"variants={{same: {{{variants}}}}}")
    row = rows(measured, 0.0)["same"]
    same = ("rounds_by_kind", "rounds", "drafted", "accepted")
    assert [row[key] for key in same] == [generated[key] for key in same]
    assert (generated["rounds_by_kind"]["plain"] > 10) is (cost > 1) and generated["drafted"] > 0


def test_every_generation_key_is_honoured_or_refused():
    """Honoured or refused by name: a benchmark config extends a generation config."""
    known = {*BenchmarkConfig.model_fields, *BenchmarkConfig.REFUSED, *BenchmarkConfig.IGNORED}
    assert {*GenerateConfig.model_fields} <= known


def write_prompts(path: Path, *responses: str) -> str:
    """The config's prompts with references, as an override."""
    rows = [{"prompt": p, "response": r} for p, r in zip(("def main(", "import os"), responses, strict=True)]
    return f"prompt_file={write_lines(path.parent / 'prompts.jsonl', rows)}"


def test_outputs_are_compared_with_references_and_batches_are_measured(path, capsys):
    few = ["temperatures=[0.0]", "repeats=1"]
    recipe, _ = run(path, *few)
    said = recipe.tokenizer.decode(recipe.runs[0.0, "baseline"][0].outputs[0])
    ask = [*few, "metrics=[exact_match,rouge1]", write_prompts(path, said, "nothing of the kind"), "batch_size=2"]
    recipe, report = run(path, *ask, "top_k=5")
    table = rows(report, 0.0)
    assert list(table) == METHODS
    for row in table.values():
        assert row["identical"] is True and row["outputs"] == 2
        assert sum(r["decoded_tokens"] for r in row["per_repeat"]) == 2 * 15
        assert row["metrics"]["exact_match"] == 0.5
        assert row["metrics"]["rouge1"] == pytest.approx(0.5, abs=0.02)
    runs = recipe.runs[0.0, "baseline"]
    others = [replace(run, outputs=[[0], [1]]) for run in runs]
    assert figures(others, runs, bandwidth=1.0)["identical"] is False
    assert "| exact_match | rouge1 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^metrics: rouge1 .*prompt 1 of 2"):
        LayerSkipBenchmark(load_config(str(path), ["metrics=[rouge1]"]))


def test_repeats_sample_anew_and_methods_take_turns(path, monkeypatch):
    """Baseline, chain, short; then again for the next prompt: after a warm-up of two lengths."""
    seen = []
    whole = Generation.__init__

    def noted(self, model, prompts, *args, **kwargs):
        whole(self, model, prompts, *args, **kwargs)
        kind = {3: "chain", 2: "short", 0: "baseline"}[self.drafters.num_speculations]
        seen.append((kind, prompts[0], self.context.sampler.seed, self.context.sampler.temperature))

    monkeypatch.setattr(Generation, "__init__", noted)
    recipe, _ = run(path, "prompt=[def main(argument, import os]")
    methods, (one, two) = ["baseline", "chain", "short"], recipe.prompts
    assert [kind for kind, *_ in seen] == methods * 2 * (2 + 4)
    assert [prompt for _, prompt, *_ in seen[:18:3]] == [two, one, one, two, one, two]
    assert [seed for *_, seed, _ in seen[6:18]] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [t for *_, t in seen] == [0.0] * 18 + [0.8] * 18
    outputs = [run.outputs for run in recipe.runs[0.8, "baseline"]]
    assert outputs[0] != outputs[2]


def test_decoding_ends_at_a_stop_string(path):
    few = ["temperatures=[0.0]", "repeats=1", "prompt=def main("]
    recipe, _ = run(path, *few)
    tokens = recipe.runs[0.0, "baseline"][0].outputs[0]
    texts = [recipe.tokenizer.decode(tokens[: n + 1]) for n in range(len(tokens))]
    stop = texts[5][-2:]
    first = next(n for n, text in enumerate(texts, start=1) if stop in text)
    again, _ = run(path, *few, f"stop_strings={json.dumps([stop])}")
    for method in METHODS:
        (one,) = again.runs[0.0, method]
        assert one.outputs == [tokens[:first]] and one.stats.tokens == first


def stop_turns(monkeypatch, stops, error) -> None:
    """A turn raises the error where `stops` says so of the number of turns."""
    calls, whole = [], Turns.decode

    def until(self, *args):
        calls.append(args)
        if stops(len(calls)):
            raise error
        return whole(self, *args)

    monkeypatch.setattr(Turns, "decode", until)


def test_what_was_measured_before_ctrl_c_is_written(path, monkeypatch, capsys):
    """In the middle of the second repeat: turns that are not complete count in no way. A complete report stays."""
    folder, kinds = path.parent / "report", ("json", "md", "png")
    folder.mkdir()
    for kind in kinds:
        (folder / f"benchmark.{kind}").write_text("complete")
    stop_turns(monkeypatch, lambda turn: turn > 6 + 6 + 4, KeyboardInterrupt)
    asked = ["metrics=[exact_match]", write_prompts(path, "x", "y")]
    monkeypatch.setattr("sys.argv", ["layerskip_benchmark", "--config", str(path), *asked])
    with pytest.raises(SystemExit) as caught:
        cli.benchmark()
    assert caught.value.code == 130
    assert all((folder / f"benchmark.{kind}").read_text() == "complete" for kind in kinds)
    partial = {folder / f"benchmark_interrupted.{kind}" for kind in kinds}
    assert {*map(Path, json.loads(capsys.readouterr().out.splitlines()[-1]).values())} == partial
    report = json.loads((folder / "benchmark_interrupted.json").read_text())
    assert report["interrupted"] is True and "Interrupted" in (folder / "benchmark_interrupted.md").read_text()
    assert {(r["temperature"], r["outputs"], r["identical"]) for r in report["results"]} == {(0.0, 3, True)}


def test_an_error_loses_nothing_that_was_measured(path, monkeypatch, capsys):
    """In the second turn at the second temperature; an error before the first turn leaves the last report."""
    stop_turns(monkeypatch, lambda turn: turn > 12 + 6 + 3, RuntimeError("out of memory"))
    file = path.parent / "report/benchmark.json"
    with pytest.raises(RuntimeError, match="out of memory"):
        run(path, "repeats=1")  # of the repeats' four batches one
    text = file.read_text()
    report = json.loads(text)
    assert report["interrupted"] is True
    assert [(row["temperature"], row["outputs"]) for row in report["results"]] == [(0.0, 2)] * 3 + [(0.8, 1)] * 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["json"] == str(file)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(path)
    assert file.read_text() == text


STRAIGHT, LOOP = list(range(20)), [1, 2] * 10


def stats(tokens: int, seconds: float, **more) -> GenerationStats:
    return GenerationStats(tokens=tokens + 1, first_tokens=1, decode_s=seconds, **more)


def runs(*outputs: tuple[int, list[int], float]) -> list[Run]:
    """Of (repeat, tokens, seconds)."""
    return [Run(repeat, [tokens], stats(20, seconds)) for repeat, tokens, seconds in outputs]


def test_looping_outputs_count_apart():
    ours = runs((0, STRAIGHT, 1.0), (0, LOOP, 0.5), (1, LOOP, 0.5))
    base = runs((0, STRAIGHT, 2.0), (0, LOOP, 2.0), (1, LOOP, 2.0))
    row = figures(ours, base, bandwidth=1.0)
    assert row["looping_outputs"] == 2 and row["identical"] is True
    assert row["tokens_per_second"] == {"median": (40 / 1.5 + 40) / 2, "min": 40 / 1.5, "max": 40.0}
    assert row["speedup"] == pytest.approx({"median": (4 / 1.5 + 4) / 2, "min": 4 / 1.5, "max": 4.0})
    assert row["speedup_not_looping"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    # Both loop on another prompt, at the same rate; on the third one ours is twice as fast.
    ours = runs((0, LOOP, 0.5), (0, STRAIGHT, 2.0), (0, STRAIGHT, 1.0))
    base = runs((0, STRAIGHT, 0.5), (0, LOOP, 2.0), (0, STRAIGHT, 2.0))
    row = figures(ours, base, bandwidth=1.0)
    assert row["speedup_not_looping"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert figures(ours[:2], base[:2], bandwidth=1.0)["speedup_not_looping"] is None
    assert figures([], [], bandwidth=1.0)["identical"] is None  # after Ctrl-C in the warm-up


def test_drafts_that_are_looked_up_cost_no_step():
    """Of 10 rounds of 4 drafts 5 were drafted, at .1 of a plain step each; half of the 40 drafts stood."""
    ours = stats(30, 1.0, rounds=10, row_rounds=10, drafted=40, accepted=20, draft_steps=20, draft_s=0.2)
    ours.rounds_accepting[2] = 10
    row = draft_figures(ours, stats(30, 3.0, rounds=30), speedup=2.0)
    assert row["draft_cost"] == pytest.approx(0.1) and row["drafted_per_round"] == 4
    assert row["ideal_speedup"] == pytest.approx((0.5 * 4 + 1) / (2 * 0.1 + 1))
    assert row["engine_efficiency"] == pytest.approx(2.0 / (3 / 1.2))


def test_rounds_without_drafts_count_as_rounds():
    """15 plain rounds, and 5 whose 4 drafted tokens all stood: 40 tokens in 20 rounds."""
    ours = stats(40, 1.0, rounds=20, row_rounds=20, drafted=20, accepted=20)
    ours.rounds_accepting[4] = 5
    row = draft_figures(ours, stats(40, 2.0, rounds=40), speedup=2.0)
    assert row["tokens_per_round"] == row["ideal_speedup"] == 2.0 and row["drafted_per_round"] == 1.0
