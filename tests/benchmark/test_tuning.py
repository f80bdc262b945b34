"""`layerskip_benchmark tune=true`: what is predicted, what is measured, and the config that comes out."""

import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import benchmark_config, generate_config, make_checkpoint
from helpers.recipes import ready, run_benchmark
from helpers.tiny import VOCAB, make_tiny

from layerskip_recipes import generate, layerskip_decoder
from layerskip_recipes.acceptance.exit_quality import exit_quality
from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.measuring import Turns
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.benchmark.tuner import (
    FIRST_LINE,
    fitted_costs,
    measured_rates,
    write_choice,
    write_config,
)
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.schema import AUTO
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.prediction import Costs, StepCost, variants
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import SPECULATION_DEFAULTS, Speculation
from layerskip_recipes.generation.stats import GenerationStats

pytestmark = pytest.mark.slow

L = 6


def small_layers(model):
    """Late layers that change little, so that drafts are accepted now and then."""
    for layer in model.layers[2:]:
        for parameter in (layer.attn.output_proj.weight, layer.mlp.w2.weight):
            parameter.data *= 0.3
    return layerskip_decoder(model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_exits_and_vocabularies_are_measured_on_the_outputs_of_texts(temperature):
    """As exit_quality does, which test_exit_quality.py compares with plain PyTorch, where only outputs have labels."""
    model, longest = small_layers(make_tiny()), 4
    prompts = [[1, 2, 3], [5, 6, 7, 8]]
    outputs = [generate(model, p, 12, temperature=temperature, seed=0).tokens[0, len(p) :].tolist() for p in prompts]
    outputs[1] = outputs[1][:3]  # a text that ends early
    some = list(range(0, VOCAB, 2))
    texts = list(zip(prompts, outputs, strict=True))
    measured = measured_rates(model, texts, some, [len(some)], longest)
    fixed = variants(measured, temperature, [0.0], [False])
    sizes = [(plan.exit_layer, plan.num_draft_tokens) for plan, _ in fixed]
    assert sorted(sizes, key=str) == sorted(((e, n) for e in range(1, L) for n in (None, len(some))), key=str)

    batches = [{"tokens": torch.tensor([p + o]), "labels": torch.tensor([[-100] * len(p) + o])} for p, o in texts]
    settings = {"num_speculations": longest, "vocabulary": some, "sizes": [len(some)]}
    quality = exit_quality(model, batches, range(1, L + 1), torch.device("cpu"), **settings)
    for plan, rates in fixed:
        by_kind = quality[plan.exit_layer].tokens_per_round[str(plan.num_draft_tokens or "all")]
        assert [n for n, _ in rates] == pytest.approx(by_kind["greedy" if temperature == 0 else "sampled"])
        assert [d for _, d in rates] == [1, 2, 3, 4]
    rates = dict(zip(sizes, (rounds for _, rounds in fixed), strict=True))
    assert rates[5, None][0] > rates[1, None][0]  # the later exit knows more
    both = variants(measured, temperature, [0.0, 0.4], [False])
    assert both[::2] == fixed
    for (plan, rounds), (ending, ended) in zip(fixed, both[1::2], strict=True):
        assert ending == replace(plan, min_confidence=0.4)
        for (tokens, drafted), end in zip(rounds, ended, strict=True):
            assert 1 <= end.num_drafted <= drafted and 1 <= end.tokens <= tokens


def exit_plan(exit_layer, num_tokens, length, int8=False):
    return Speculation(exit_layer, length, num_tokens and range(num_tokens), draft_int8=int8)


def trained_plan(exit_layer, draft_layers, model_layers, length, int8=False):
    draft = SimpleNamespace(num_layers=draft_layers, model_layers=model_layers, folder="draft")
    return Speculation(exit_layer, length, range(100), draft_int8=int8, draft=draft)


COPY, ADAPTER = partial(trained_plan, 4, 4, 0), partial(trained_plan, 8, 1, 8)


@pytest.mark.parametrize(
    ("probed", "found_for"),
    [
        (
            [exit_plan(4, 100, 8), exit_plan(16, 100, 4), exit_plan(4, None, 4)],
            [exit_plan(8, None, 3), exit_plan(8, 500, 7, True), exit_plan(20, 100, 1)],
        ),
        ([COPY(8)], [COPY(3), COPY(5, True)]),
        ([ADAPTER(8)], [ADAPTER(3), ADAPTER(5, True)]),
    ],
    ids=["exits", "copy", "adapter"],
)
def test_costs_are_found_from_probes(probed, found_for):
    """Times by the formula of prediction.py, for layers of 1 ms, heads of 1 us a row, and int8 at a quarter of it."""
    draft = {False: StepCost(2e-4, 1e-3, 1e-6), True: StepCost(2e-4, 2.5e-4, 2.5e-7)}
    costs = Costs(32, 1000, 0.033, draft, 0.04, 3e-4)

    def probe(plan):
        d, layers = plan.num_speculations, plan.draft_layers or plan.model_layers
        seconds = draft[plan.draft_int8].seconds(layers, plan.num_draft_tokens or 1000)
        if plan.draft_layers:
            seconds += 1e-3 * plan.model_layers
        shared = 0 if plan.draft_int8 and not plan.draft_layers else plan.model_layers
        verify = 0.033 * (1 + 0.04 * d * (1 - shared / 32))
        stats = GenerationStats(rounds=10, draft_steps=10 * d, draft_s=10 * d * seconds, verify_s=10 * verify)
        stats.decode_s = stats.draft_s + stats.verify_s + 10 * 3e-4
        return stats

    probes = [replace(plan, draft_int8=int8) for int8 in (False, True) for plan in probed]
    found = fitted_costs([(plan, probe(plan)) for plan in probes], 0.033, 32, 1000, 1)
    for plan in found_for:
        d = plan.num_speculations
        assert found.round_s(plan, d) == pytest.approx(costs.round_s(plan, d))


@pytest.fixture
def config(tmp_path, checkpoint):
    """A benchmark that tunes: its path as a function of the generation config that it extends and of other keys."""

    def config(extends=None, **changes):
        extends = extends or str(generate_config(tmp_path / "user", checkpoint, compile=True))
        settings = {"tune": True, "tune_extends": extends, "temperatures": [0.0], "repeats": 1}
        return benchmark_config(tmp_path, checkpoint, **settings | changes)

    return config


def loaded(path):
    return BenchmarkConfig.load(load_config(str(path)))


def written_by(cfg, best, folder):
    """The generation config that is written for a choice."""
    write_config(folder / "tuned.yaml", cfg, best, "because")
    return GenerateConfig.load(load_config(str(folder / "tuned.yaml")))


CHOICE = {"exit_layer": 3, "num_speculations": 5, "draft_vocabulary": 64, "draft_int8": True}
EXIT = SelfSpeculation(**SPECULATION_DEFAULTS | {"exit_layer": 1, "num_speculations": 2})


@pytest.mark.parametrize("best", [SelfSpeculation(**SPECULATION_DEFAULTS | CHOICE), EXIT, None])
def test_the_config_has_what_differs_from_the_users(best, config, tmp_path, checkpoint, monkeypatch):
    """It loads from another folder, keeps the user's keys, and sets what was measured; null where nothing pays."""
    theirs = {"max_new_tokens": 17, "compile": True, "top_p": 0.5, "repetition_penalty": 1.5}
    theirs["quantizer"] = {"_component_": "torchao.quantization.Int8WeightOnlyConfig"}
    generate_config(tmp_path, checkpoint, **theirs, self_speculation={"exit_layer": 2, "prompt_lookup": 3})
    monkeypatch.chdir(tmp_path)  # a relative path
    cfg = loaded(config("generate.yaml", temperatures=[0.8, 0.0], top_k=50, batch_size=2))
    written = written_by(cfg, best, tmp_path / "a")
    assert written.max_new_tokens == 17
    assert (written.temperature, written.top_k, written.batch_size, written.compile) == (0.8, 50, 2, False)
    # Keys that were not measured are off, also where the user has them on.
    assert written.top_p is written.repetition_penalty is written.quantizer is None
    assert written.self_speculation == best
    text = (tmp_path / "a" / "tuned.yaml").read_text()
    assert "because" in text and "dtype" not in text and "max_new_tokens" not in text
    # Nothing is left for generation to choose.
    assert best is None or AUTO not in dict(written.self_speculation).values()
    monkeypatch.chdir("/")
    assert load_config(str(tmp_path / "a" / "tuned.yaml")).max_new_tokens == 17


def test_the_config_has_checkpoint_device_and_compilation_as_measured(config, tmp_path, checkpoint, tokenizer_folder):
    """Not the user's; and drafts take the place of the user's exit."""
    other = make_checkpoint(tmp_path / "other", tokenizer_folder)
    user = generate_config(tmp_path / "user", other, exit_layer=2, self_speculation=None)
    cfg = loaded(config(str(user), compile=True))
    written = written_by(cfg, EXIT, tmp_path)
    assert (written.given_folder, written.compile, written.exit_layer) == (str(checkpoint), True, None)
    for device in (cfg.device, "cuda:7"):
        write_config(tmp_path / "tuned.yaml", cfg.model_copy(update={"device": device}), None, "because")
        assert load_config(str(tmp_path / "tuned.yaml")).device == device
    write_config(tmp_path / "ours.yaml", loaded(config("quickstart/generate")), None, "because")
    assert load_config(str(tmp_path / "ours.yaml")).self_speculation is None


@pytest.mark.parametrize("stored", [True, False])
def test_the_recipe_measures_the_best_and_writes_the_fastest(stored, config, tmp_path, checkpoint, capsys, monkeypatch):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    if stored:
        (folder / "layerskip.json").write_text(json.dumps({"exits": [1, 4], "vocabulary": [*range(40)]}))
    path = config(max_new_tokens=24, temperatures=[0.0, 0.8] if stored else [0.0])
    recipe, report = run_benchmark(path, f"checkpointer.checkpoint_dir={folder}")
    variants = [row for row in report["results"] if row["name"] != "baseline"]
    rows = {row["name"]: row["speedup"]["median"] for row in variants if row["temperature"] == 0}
    assert set(rows) == set(recipe.tuned_sections) and sum("lookup" in name for name in rows) == 1
    assert all(row["identical"] for row in variants if row["temperature"] == 0)
    # Predicted is what the choice is for.
    predicted = {(row["temperature"], row["name"]) for row in variants if row["predicted_speedup"]}
    assert predicted == {(0.0, name) for name in rows if "lookup" not in name}
    fastest = max(rows, key=rows.get)
    cfg = GenerateConfig.load(load_config(str(tmp_path / "report" / "tuned.yaml")))
    assert cfg.compile is False  # as it was measured
    assert cfg.self_speculation == (recipe.tuned_sections[fastest] if rows[fastest] > 1 else None)
    vocabularies = {name: plan.draft_vocabulary for name, plan in recipe.methods.items() if plan}
    for name, ids in vocabularies.items():
        assert not (stored and ids) or ids == [*range(40)]
        # Where no tokens are stored, generation would count those of its own prompts.
        assert recipe.tuned_sections[name].draft_vocabulary == (40 if stored and ids else ids)
    out = capsys.readouterr().out
    assert "predicted" in out and "measured" in out and "fastest: " in out
    # Beside the report of the same config without tune.
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"tune.json", "tune.md", "tune.png", "tuned.yaml"}
    written = json.loads((tmp_path / "report" / "tune.json").read_text())
    assert written["results"] == json.loads(json.dumps(report["results"]))
    loaded(path)  # its own config may be written again
    # After Ctrl-C no config is chosen by half of the measurements.
    (tmp_path / "report" / "tuned.yaml").unlink()
    calls, whole = [], Turns.decode

    def until(self, *args):
        calls.append(args)
        if len(calls) > 2 * len(recipe.methods) + 2:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(Turns, "decode", until)
    assert recipe.benchmark()["interrupted"] is True
    assert not (tmp_path / "report" / "tuned.yaml").exists()


def test_a_tuned_config_without_drafts_begins_with_the_reason(config, tmp_path):
    row = {"name": "draft_6", "temperature": 0.0, "speedup": {"median": 0.7}, "predicted_speedup": None}
    report = {"results": [row], "device": "cpu"}
    written = tmp_path / "tuned.yaml"
    write_choice(loaded(config()), written, report, {"draft_6": EXIT})
    assert written.read_text().startswith(f"{FIRST_LINE}no drafts, since draft_6 had 0.70x, temperature 0.0, cpu\n")
    assert load_config(str(written)).self_speculation is None


def test_a_file_of_somebody_elses_is_not_overwritten(config, tmp_path):
    """Said before anything is measured; without tune no config is written."""
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "tuned.yaml").write_text("mine\n")
    message = r"^report_dir: '.*tuned.yaml' exists, and layerskip_benchmark .*; for example report_dir=\S+$"
    with pytest.raises(ValueError, match=message):
        LayerSkipBenchmark(load_config(str(config())))
    LayerSkipBenchmark(load_config(str(config(tune=False, tune_extends=None))))


def test_outputs_too_short_for_a_draft_are_refused(config):
    with pytest.raises(ValueError, match=r"^max_new_tokens: .*max_new_tokens=128"):
        ready(LayerSkipBenchmark, config(max_new_tokens=2))
