"""The benchmark recipe: its report against the raw numbers in it, the peers' outputs, Ctrl-C, and wrong settings.

No speed is asserted: only that what is reported follows from what was measured.
"""

import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from helpers.commands import run_tune
from helpers.configs import benchmark_config, generate_config, make_checkpoint, unknown_suggestions
from omegaconf import OmegaConf
from torchtune.training import FullModelHFCheckpointer

from layerskip_recipes.benchmark import peers
from layerskip_recipes.benchmark import recipe as benchmark
from layerskip_recipes.benchmark.config import REFUSED, SETTINGS
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark, Run, figures
from layerskip_recipes.checkpoint.export import export
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import SETTINGS as GENERATE_SETTINGS
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.report import draft_figures
from layerskip_recipes.generation.stats import GenerationStats

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
PEERS = ["torchtune", *(["transformers", "transformers_early_exit"] if HAS_TRANSFORMERS else [])]
WAYS = ["baseline", "chain", "tree", *PEERS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("benchmark") / "checkpoint", tokenizer_folder)


@pytest.fixture
def path(tmp_path, checkpoint) -> Path:
    return benchmark_config(tmp_path, checkpoint)


def run(path: Path, *overrides: str) -> tuple[LayerSkipBenchmark, dict]:
    recipe = LayerSkipBenchmark(load_config(str(path), overrides))
    recipe.setup()
    return recipe, recipe.benchmark()


@pytest.fixture(scope="module")
def report(tmp_path_factory, checkpoint) -> dict:
    """Of a real `tune run` with all peers that are installed; `folder` is where it ran, `stdout` what it printed."""
    folder = tmp_path_factory.mktemp("run")
    path = benchmark_config(folder, checkpoint, peers=PEERS)
    ran = run_tune("run", "layerskip_benchmark", "--config", str(path), "seed=3", cwd=folder, cold=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((folder / "report/benchmark.json").read_text()) | {"folder": folder, "stdout": ran.stdout}


def rows(report: dict, temperature: float) -> dict[str, dict]:
    return {row["name"]: row for row in report["results"] if row["temperature"] == temperature}


def test_the_files_and_what_is_printed(report):
    folder = report["folder"] / "report"
    assert {p.name for p in folder.iterdir()} == {"benchmark.json", "benchmark.md", "benchmark.png"}
    assert (folder / "benchmark.png").read_bytes()[:4] == b"\x89PNG"
    table = (folder / "benchmark.md").read_text()
    printed, _, last = report["stdout"].rstrip().rpartition("\n")
    assert printed.strip() == table.strip()
    assert json.loads(last) == {
        "json": str(folder / "benchmark.json"),
        "markdown": str(folder / "benchmark.md"),
        "picture": str(folder / "benchmark.png"),
    }
    assert len(re.findall("^## Temperature", table, flags=re.M)) == 2
    for name in WAYS:
        assert len(re.findall(rf"^\| {name}[ ,]", table, flags=re.M)) == 2, name


def test_where_and_how_it_was_measured(report):
    assert report["command"].startswith("tune run layerskip_benchmark --config ") and "seed=3" in report["command"]
    assert torch.__version__.startswith(report["versions"]["torch"]) and set(report["versions"]) == {
        *("python", "torch", "torchtune", "torchao"),
        *(["transformers"] if HAS_TRANSFORMERS else []),
    }
    assert report["device"] and report["threads"] >= 1 and report["memory_bandwidth"] > 1e8
    assert (report["prompts"], report["batch_size"], report["repeats"], report["max_new_tokens"]) == (2, 1, 2, 16)
    assert report["compiled"] is report["interrupted"] is False and report["peers_left_out"] == {}
    assert report["config"]["variants"]["chain"] == {"exit_layer": 2, "num_speculations": 3}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_figures_follow_from_the_raw_numbers(report, temperature):
    """Rates and speed-ups from tokens and seconds of each repeat; efficiency from acceptance and the draft's cost."""
    table = rows(report, temperature)
    assert list(table) == WAYS
    base = table["baseline"]
    for name, row in table.items():
        assert row["kind"] == ("peer" if name in PEERS else "baseline" if name == "baseline" else "variant")
        assert row["outputs"] == 4 and len(row["per_repeat"]) == 2
        rates = [r["decoded_tokens"] / r["decode_s"] for r in row["per_repeat"]]
        base_rates = [r["decoded_tokens"] / r["decode_s"] for r in base["per_repeat"]]
        ratios = [ours / theirs for ours, theirs in zip(rates, base_rates, strict=True)]
        for key, values in {"tokens_per_second": rates, "speedup": ratios}.items():
            expected = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            assert row[key] == pytest.approx(expected)
        if not row["looping_outputs"]:
            assert row["tokens_per_second_not_looping"] == row["tokens_per_second"]
        assert row["prefill_s"] > 0
    for name in ("chain", "tree"):
        row = table[name]
        assert row["acceptance_rate"] == row["accepted"] / row["drafted"]
        assert row["drafted_per_round"] == row["drafted"] / row["rounds"]
        assert row["rounds_by_kind"] == {"fixed exit 2": row["rounds"]}
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


def test_greedy_outputs_are_the_same_in_all_ways(report):
    """The peers' too: torchtune's and transformers' own decoding of the checkpoint."""
    assert {name: row["identical"] for name, row in rows(report, 0.0).items()} == dict.fromkeys(WAYS, True)
    assert {row["identical"] for row in rows(report, 0.8).values()} == {None}


def test_outputs_are_compared_with_references(path, capsys):
    """One reference is what the model says, decoded; the other is something else."""
    recipe, _ = run(path, "temperatures=[0.0]", "repeats=1")
    said = recipe.tokenizer.decode(recipe.runs[0.0, "baseline"][0].outputs[0])
    lines = [{"prompt": "def main(", "response": said}, {"prompt": "import os", "response": "nothing of the kind"}]
    prompts = path.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ask = ["metrics=[exact_match,rouge1]", "temperatures=[0.0]", "repeats=2", f"prompt_file={prompts}"]
    recipe, report = run(path, *ask, "variants.shallow.early_exit=1")
    table = rows(report, 0.0)
    for name in ("baseline", "chain", "tree"):
        assert table[name]["metrics"]["exact_match"] == 0.5
        assert table[name]["metrics"]["rouge1"] == pytest.approx(0.5, abs=0.02)
    assert table["shallow"]["metrics"]["exact_match"] == 0
    assert "| exact_match | rouge1 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^metrics: rouge1 needs references, and prompt 1 of 2 has none"):
        LayerSkipBenchmark(load_config(str(path), ["metrics=[rouge1]"]))
    with pytest.raises(ValueError, match=r"^metrics: 'rouge' is unknown"):
        LayerSkipBenchmark(load_config(str(path), ["metrics=[rouge]"]))


def test_repeats_sample_anew_and_ways_take_turns(path, monkeypatch):
    """Baseline, chain, tree; then again for the next prompt: after a warm-up of two lengths."""
    seen = []
    whole = Generation.__init__

    def noted(self, model, prompts, *args, **kwargs):
        whole(self, model, prompts, *args, **kwargs)
        kind = "tree" if self.tree and not self.tree.is_chain else "chain" if self.tree else "baseline"
        seen.append((kind, prompts[0], self.sampler.rng.initial_seed(), self.sampler.temperature))

    monkeypatch.setattr(Generation, "__init__", noted)
    recipe, _ = run(path, "prompt=[def main(argument, import os]")
    ways, (one, two) = ["baseline", "chain", "tree"], recipe.prompts
    assert [kind for kind, *_ in seen] == ways * 2 * (2 + 4)
    assert [prompt for _, prompt, *_ in seen[:18:3]] == [two, one, one, two, one, two]
    assert [seed for *_, seed, _ in seen[6:18]] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [t for *_, t in seen] == [0.0] * 18 + [0.8] * 18
    outputs = [run.outputs for run in recipe.runs[0.8, "baseline"]]
    assert outputs[0] != outputs[2]


def test_a_batch_of_two_lengths_and_an_exit_without_verification(path):
    changes = ["batch_size=2", "peers=[torchtune,transformers]", "variants.tree=null", "variants.shallow.early_exit=1"]
    _, report = run(path, *changes, "temperatures=[0.0]", "repeats=1", "top_k=5")
    table = rows(report, 0.0)
    assert list(table) == ["baseline", "chain", "shallow", "torchtune", *(["transformers"] if HAS_TRANSFORMERS else [])]
    for name, row in table.items():
        assert row["identical"] is (name != "shallow") and row["outputs"] == 2
        assert sum(r["decoded_tokens"] for r in row["per_repeat"]) == 2 * 15
    assert table["shallow"]["ideal_speedup"] is None and table["shallow"]["bytes_per_token"] > 0
    assert table["chain"]["drafted_per_round"] <= 3


def test_what_was_measured_before_ctrl_c_is_written(path, monkeypatch, capsys):
    """In the middle of the second repeat: turns that are not complete count in no way."""
    calls, whole = [], LayerSkipBenchmark.run

    def until(self, *args):
        calls.append(args)
        if len(calls) > 6 + 6 + 4:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(LayerSkipBenchmark, "run", until)
    prompts = path.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "def main(", "response": "x"}\n{"prompt": "import os", "response": "y"}\n')
    asked = ["metrics=[exact_match]", f"prompt_file={prompts}"]
    monkeypatch.setattr("sys.argv", ["layerskip_benchmark", "--config", str(path), *asked])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 130
    report = json.loads((path.parent / "report/benchmark.json").read_text())
    assert report["interrupted"] is True and "Interrupted" in (path.parent / "report/benchmark.md").read_text()
    assert {(r["temperature"], r["outputs"], r["identical"]) for r in report["results"]} == {(0.0, 3, True)}


def test_a_complete_report_stays_where_a_later_run_is_interrupted(path, monkeypatch, capsys):
    """The partial one goes beside it, and gives way to the next."""
    few, folder = ["temperatures=[0.0]", "repeats=1"], path.parent / "report"
    run(path, *few)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    calls, whole = [], LayerSkipBenchmark.run

    def until(self, *args):
        calls.append(args)
        if len(calls) % 10 == 0:  # in the first turn after the warm-up
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(LayerSkipBenchmark, "run", until)
    partial = {"benchmark_interrupted.json", "benchmark_interrupted.md", "benchmark_interrupted.png"}
    for _ in range(2):
        del calls[:]
        capsys.readouterr()
        assert run(path, *few)[1]["interrupted"] is True
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert {Path(name).name for name in printed.values()} == partial
        assert {file.name for file in folder.iterdir()} == {*before, *partial}
        assert {name: (folder / name).read_bytes() for name in before} == before
    assert json.loads((folder / "benchmark_interrupted.json").read_text())["interrupted"] is True


def test_a_peer_that_is_not_there_or_fails_is_left_out(path, monkeypatch):
    def broken(job):
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "transformers" else True)
    monkeypatch.setitem(peers.PEERS, "torchtune", broken)
    _, report = run(path, "peers=[torchtune,transformers]", "temperatures=[0.0]", "repeats=1")
    assert list(rows(report, 0.0)) == ["baseline", "chain", "tree"] and "transformers" not in report["versions"]
    left_out = {"torchtune": "RuntimeError: no such kernel"}
    left_out["transformers"] = "ModuleNotFoundError: transformers is not installed"
    assert report["peers_left_out"] == left_out
    assert "transformers is left out" in (path.parent / "report/benchmark.md").read_text()


def of_torchtune(monkeypatch, fails) -> list[float]:
    """Replaces the peer: what it decodes is nothing, and fails(call, temperature) says whether it raises.

    Returns:
        The temperatures of its calls; the first two of each temperature are its trial.
    """
    calls = []

    def decode(prompts, sampler, seed):
        calls.append(sampler.temperature)
        if fails(len(calls), sampler.temperature):
            raise MemoryError("no more\nmemory")
        return [[1, 2] for _ in prompts], GenerationStats(tokens=2, rows=1, decode_s=1.0)

    monkeypatch.setitem(peers.PEERS, "torchtune", lambda job: {"only": decode})
    return calls


def test_a_peer_that_works_at_one_temperature_only_is_in_no_table(path, monkeypatch):
    of_torchtune(monkeypatch, lambda call, temperature: temperature > 0)
    _, report = run(path, "peers=[torchtune]", "repeats=1")
    assert report["peers_left_out"] == {"torchtune": "RuntimeError: only: MemoryError: no more"}
    assert [row["name"] for row in report["results"]] == ["baseline", "chain", "tree"] * 2


def test_a_peer_that_fails_later_takes_nothing_with_it(path, monkeypatch):
    """In its trials (4 calls), in the warm-up and turns of the first temperature (2 + 4) it works; then no more."""
    calls = of_torchtune(monkeypatch, lambda call, temperature: call > 4 + 6 + 3)
    _, report = run(path, "peers=[torchtune]")
    assert calls == [0.0, 0.0, 0.8, 0.8] + [0.0] * 6 + [0.8] * 4
    assert report["peers_left_out"] == {"torchtune": "MemoryError: no more, at temperature 0.8"}
    assert [(row["name"], row["outputs"]) for row in report["results"]] == [
        *((name, 4) for name in ["baseline", "chain", "tree"] * 2)
    ]
    assert report["interrupted"] is False


def test_an_error_loses_nothing_that_was_measured(path, monkeypatch, capsys):
    """In the second turn at the second temperature; an error before the first turn leaves the last report."""
    calls, whole = [], LayerSkipBenchmark.run

    def broken(self, *args):
        calls.append(args)
        if len(calls) > 12 + 6 + 3:  # of the repeats' four batches one
            raise RuntimeError("out of memory")
        return whole(self, *args)

    monkeypatch.setattr(LayerSkipBenchmark, "run", broken)
    file = path.parent / "report/benchmark.json"
    with pytest.raises(RuntimeError, match="out of memory"):
        run(path, "repeats=1")
    text = file.read_text()
    report = json.loads(text)
    assert report["interrupted"] is True
    assert [(row["temperature"], row["outputs"]) for row in report["results"]] == [(0.0, 2)] * 3 + [(0.8, 1)] * 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["json"] == str(file)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(path)
    assert file.read_text() == text


def test_the_best_setting_of_a_peer_wins():
    """By the second call of each; a setting that fails is only noted."""

    def decode(seconds: float):
        def run(prompts, sampler, seed):
            return [[1, 2]], GenerationStats(tokens=11, rows=1, decode_s=seconds)

        return run

    def fails(*_):
        raise RuntimeError("no compiler")

    job = peers.Job(*[None] * 8)
    peer = peers._best({"slow": decode(2.0), "fast": decode(1.0), "broken": fails}, job, None)
    assert peer.setting == "fast" and peer.trial == {"slow": 5.0, "fast": 10.0, "broken": "RuntimeError: no compiler"}


def stats(tokens: int, seconds: float, **more) -> GenerationStats:
    return GenerationStats(tokens=tokens + 1, rows=1, decode_s=seconds, **more)


def test_looping_outputs_count_apart():
    straight, loop = list(range(20)), [1, 2] * 10
    ours = [Run(0, [straight], stats(20, 1.0)), Run(0, [loop], stats(20, 0.5)), Run(1, [loop], stats(20, 0.5))]
    base = [Run(0, [straight], stats(20, 2.0)), Run(0, [loop], stats(20, 2.0)), Run(1, [loop], stats(20, 2.0))]
    row = figures(ours, base, greedy=True, bandwidth=1.0)
    assert row["looping_outputs"] == 2 and row["identical"] is True
    assert row["tokens_per_second"] == {"median": (40 / 1.5 + 40) / 2, "min": 40 / 1.5, "max": 40.0}
    assert row["speedup"] == pytest.approx({"median": (4 / 1.5 + 4) / 2, "min": 4 / 1.5, "max": 4.0})
    assert row["tokens_per_second_not_looping"] == {"median": 20.0, "min": 20.0, "max": 20.0}
    assert row["speedup_not_looping"] == {"median": 2.0, "min": 2.0, "max": 2.0}


def test_without_loops_the_same_prompts_are_compared():
    """Both loop on another prompt, at the same rate; on the third one ours is twice as fast."""
    straight, loop = list(range(20)), [1, 2] * 10
    ours = [Run(0, [loop], stats(20, 0.5)), Run(0, [straight], stats(20, 2.0)), Run(0, [straight], stats(20, 1.0))]
    base = [Run(0, [straight], stats(20, 0.5)), Run(0, [loop], stats(20, 2.0)), Run(0, [straight], stats(20, 2.0))]
    row = figures(ours, base, greedy=False, bandwidth=1.0)
    assert row["speedup_not_looping"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert row["tokens_per_second_not_looping"]["median"] == pytest.approx(40 / 3)
    assert figures(ours[:2], base[:2], greedy=False, bandwidth=1.0)["speedup_not_looping"] is None


def test_nothing_compared_is_not_identical():
    """After Ctrl-C in the warm-up."""
    assert figures([], [], greedy=True, bandwidth=1.0)["identical"] is None


def test_every_key_of_generation_is_known():
    """Honoured or refused by name: a benchmark config extends a generation config."""
    assert {*GENERATE_SETTINGS} <= {*SETTINGS} | {*REFUSED}


def test_drafts_that_are_looked_up_cost_no_step():
    """Of 10 rounds of 4 drafts 5 were drafted, at .1 of a plain step each; half of the 40 drafts stood."""
    ours = stats(30, 1.0, rounds=10, drafted=40, accepted=20, draft_steps=20, draft_s=0.2)
    ours.rounds_accepting[2] = 10
    row = draft_figures(ours, stats(30, 3.0, rounds=30), speedup=2.0)
    assert row["draft_cost"] == pytest.approx(0.1) and row["drafted_per_round"] == 4
    assert row["ideal_speedup"] == pytest.approx((0.5 * 4 + 1) / (2 * 0.1 + 1))
    assert row["engine_efficiency"] == pytest.approx(2.0 / (3 / 1.2))


def test_help_shows_two_commands(tmp_path):
    ran = run_tune("run", "layerskip_benchmark", "--config", "x", "--help", cwd=tmp_path)
    assert ran.returncode == 0 and ran.stdout.count("tune run layerskip_benchmark --config quickstart/benchmark") == 2


# Overrides, the key at the message's start, the value given, what is allowed.
WRONG = [
    ("temperatures=[]", "temperatures", "[]", "[0.0,0.8]"),
    ("temperatures=0.8", "temperatures", "0.8", "[0.0,0.8]"),
    ("temperatures=[0.8, 0.8]", "temperatures", "[0.8, 0.8]", "different"),
    ("temperatures=[0.0, -1]", "temperatures", "-1", "0 or more"),
    ("temperatures=[hot]", "temperatures", "'hot'", "0 or more"),
    ("temperature=0.8", "temperature", "0.8", "temperatures lists them"),
    ("repeats=0", "repeats", "0", "1 or more"),
    ("max_new_tokens=1", "max_new_tokens", "1", "2 or more"),
    ("max_new_tokens=1000", "max_new_tokens", "1000", "up to "),
    ("batch_size=0", "batch_size", "0", "1 or more"),
    ("prompt=[a, b, c]; batch_size=2", "batch_size", "2", "batch_size=1"),
    ("compile=yes please", "compile", "'yes please'", "true, false"),
    ("top_k=0", "top_k", "0", "1 or more"),
    ("min_p=2", "min_p", "2", "0 to 1"),
    ("repetition_penalty=0", "repetition_penalty", "0", "above 0"),
    ("report_dir=null", "report_dir", "None", "text"),
    ("~report_dir", "report_dir", "None", "text"),
    ("report_dir=benchmark.yaml/x", "report_dir", "'benchmark.yaml/x'", "in the way"),
    ("picture=3", "picture", "3", "text"),
    ("picture=benchmark.yaml/x.png", "picture", "'benchmark.yaml'", "in the way"),
    ("prompt=null", "prompt", "missing", "prompt_file=FILE"),
    ("prompt=interactive", "prompt", "'interactive'", "prompt=["),
    ("stop_strings=[END]", "stop_strings", "END", "metrics=[rougeL]"),
    ("stream=true", "stream", "True", "stream=null"),
    ("picture=benchmark.txt", "picture", "'benchmark.txt'", "benchmark.png"),
    ("quantizer.groupsize=16", "quantizer", "16", "draft_quantizer"),
    ("variant=3", "variant", "unknown key", "Nearest: variants"),
    ("~variants", "variants", "None", "variants.chain.exit_layer=3"),
    ("variants=chain", "variants", "'chain'", "variants.chain.exit_layer=3"),
    ("variants.chain=null; variants.tree=null", "variants", "None", "variants.chain.exit_layer=3"),
    ("variants.chain=3", "variants.chain", "3", "self_speculation"),
    ("variants.chain.exit_layer=9", "variants.chain.exit_layer", "9", "1..4"),
    ("variants.chain.num_speculations=0", "variants.chain.num_speculations", "0", "1 or more"),
    (
        "variants.chain.threshold=0.5; variants.chain.tree_width=2",
        "variants.chain.threshold",
        "0.5",
        "variants.chain.threshold=null, or variants.chain.tree_width=1 variants.chain.tree_children=1",
    ),
    ("variants.chain.num_speculation=3", "variants.chain.num_speculation", "unknown key", "Nearest: num_speculations"),
    ("~variants.chain.num_speculations", "variants.chain.num_speculations", "missing", "{early_exit: 3}"),
    ("variants.chain.early_exit=2", "variants.chain.exit_layer", "unknown key", "early_exit"),
    ("variants.x.early_exit=5", "variants.x.early_exit", "5", "1..4"),
    ("variants.x.early_exit=null", "variants.x.early_exit", "None", "1..4"),
    ("variants.baseline.early_exit=2", "variants.baseline", "taken", "variants.chain"),
    ("variants.torchtune.early_exit=2", "variants.torchtune", "taken", "variants.chain"),
    ("peers=torchtune", "peers", "'torchtune'", "[torchtune]"),
    ("peers=[vllm]", "peers", "'vllm'", "torchtune, transformers, transformers_early_exit"),
    ("peers=[torchtune, torchtune]", "peers", "'torchtune' stands twice", "peers=[torchtune]"),
    ("peers=[torchtune]; top_p=0.9", "peers", "top_p=0.9", "peers=[transformers]"),
    ("peers=[transformers_early_exit]; batch_size=2", "peers", "2", "batch_size=1"),
    (
        "peers=[transformers_early_exit]; variants.chain=null; variants.tree=null; variants.x.early_exit=2",
        "peers",
        "none does",
        "variants.chain.exit_layer=8",
    ),
    ("self_speculation.exit_layer=2", "self_speculation", "2", "variants"),
]


@pytest.mark.parametrize(("overrides", "key", "given", "allowed"), WRONG)
def test_a_wrong_setting_is_one_error_before_the_model_loads(path, monkeypatch, overrides, key, given, allowed):
    def load(self, *args, **kwargs):
        raise AssertionError("the weights are loaded before the mistake is found")

    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", load)
    monkeypatch.chdir(path.parent)
    with pytest.raises(ValueError) as caught:
        LayerSkipBenchmark(load_config(str(path), overrides.split("; "))).setup()
    message = " ".join(str(caught.value).split())
    assert isinstance(caught.value, ConfigError) and message.startswith(f"{key}: "), message
    assert given in message and allowed in message
    assert not unknown_suggestions(message, SETTINGS), message
    assert [p.name for p in path.parent.iterdir()] == ["benchmark.yaml"]


ODD = ["null", "true", "3", "-1", "1.5", "abc", "[]", "[1]", "{}", "{a: 1}"]


def test_odd_values_are_taken_or_refused_by_key(path):
    """Whatever stands there, the constructor fails with a ValueError of ours that names the key, or not at all."""
    keys = {*SETTINGS} - {"model", "checkpointer", "tokenizer"} | {"variants.chain", "variants.x"}
    keys |= {f"variants.chain.{key}" for key in ("exit_layer", "num_speculations", "threshold", "early_exit")}
    overrides = [f"{key}={value}" for key in sorted(keys) for value in ODD]
    # All keys are resolved together, before any is looked at.
    overrides += ["report_dir=${nowhere}", "variants.chain.exit_layer=${nowhere}"]
    wrong = []
    for override in overrides:
        try:
            LayerSkipBenchmark(load_config(str(path), [override]))
        except ValueError as e:
            key = override.partition("=")[0]
            if not isinstance(e, ConfigError) or not {key, key.split(".")[-1], key.split(".")[0]} & set(
                re.split("[.:]", str(e))
            ):
                wrong.append(f"{override}: {e}")
        except Exception as e:
            wrong.append(f"{override}: {type(e).__name__}: {e}")
    assert not wrong, "\n".join(wrong)


def test_a_checkpoint_that_transformers_cannot_open():
    """Its folder has no config.json, which torchtune's own checkpointers do not need."""
    with pytest.raises(ValueError, match=r"^peers: transformers needs config.json .*'/nowhere'.* peers=\[torchtune\]"):
        peers.check_peer_files(["torchtune", "transformers"], OmegaConf.create({"checkpoint_dir": "/nowhere"}))
    peers.check_peer_files(["torchtune"], OmegaConf.create({}))


def test_adapters_are_not_the_peers_model():
    section = OmegaConf.create({"checkpoint_dir": "/base", "adapter_checkpoint": "/adapters"})
    with pytest.raises(ValueError, match=r"^peers: torchtune would run the base without .*adapter_checkpoint"):
        peers.check_peer_files(["torchtune"], section)
    peers.check_peer_files([], section)


def test_transformers_would_add_adapters_to_merged_weights(tmp_path, tokenizer_folder):
    """A LoRA training's epoch_N has them beside the weights; what `layerskip export` makes of it has not."""
    folder = make_checkpoint(tmp_path / "epoch_0", tokenizer_folder)
    (folder / "adapter_config.json").write_text("{}")
    section = OmegaConf.create({"checkpoint_dir": str(folder)})
    for name in ("transformers", "transformers_early_exit"):
        with pytest.raises(ValueError, match=rf"^peers: {name} would add the adapters .*`layerskip export {folder} "):
            peers.check_peer_files(["torchtune", name], section)
    peers.check_peer_files(["torchtune"], section)
    exported = export(str(folder), str(tmp_path / "exported"))
    peers.check_peer_files(["transformers"], OmegaConf.create({"checkpoint_dir": str(exported)}))


def test_a_generation_config_becomes_a_benchmark(tmp_path, checkpoint):
    """What means nothing here is switched off by null; the stop tokens count."""
    user = generate_config(tmp_path, checkpoint, stop_tokens=[7], stream=False, benchmark={"compare": True})
    own = ["self_speculation=null", "temperature=null", "benchmark=null", "stream=null", f"report_dir={tmp_path}"]
    cfg = load_config(str(user), [*own, "variants.chain={exit_layer: 2, num_speculations: 2}"])
    assert 7 in LayerSkipBenchmark(cfg).stop_tokens
