"""`layerskip_benchmark tune=true`: what is predicted, what is measured, and the config that comes out."""

import json
import random

import pytest
import torch
from helpers.configs import benchmark_config, generate_config, make_checkpoint
from helpers.tiny import make_tiny

from layerskip_recipes import generate, layerskip_decoder
from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.benchmark.sweep import Pair
from layerskip_recipes.benchmark.tuner import (
    choose,
    count_rounds,
    predict,
    probes,
    round_cost,
    round_tokens,
    write_config,
)
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.sampling import Sampler

pytestmark = pytest.mark.slow

L = 6


def small_layers(model):
    """Late layers that change little, so that drafts are accepted now and then."""
    for layer in model.layers[2:]:
        for parameter in (layer.attn.output_proj.weight, layer.mlp.w2.weight):
            parameter.data *= 0.3
    return layerskip_decoder(model)


def rounds_by_chance(overlap, d, generator):
    """The rounds of one writing of the text: each draft stands or not by a die."""
    at, rounds = 0, 0
    while at < len(overlap):
        rounds += 1
        for _ in range(d):
            at += 1
            if at > len(overlap) or generator.random() >= overlap[at - 1]:
                break
        else:
            at += 1
    return rounds


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_tokens_of_a_round(temperature):
    """By hand: sum min(p, q) at each position, and rounds played by dice (greedy: no chance)."""
    model = small_layers(make_tiny())
    sampler = Sampler(temperature, top_k=20)
    prompts, new, longest = [[1, 2, 3], [5, 6, 7, 8]], 12, 4
    rng = torch.Generator().manual_seed(0)
    outputs = [
        generate(model, p, new, temperature=temperature, top_k=20, rng=rng).tokens[0, len(p) :].tolist()
        for p in prompts
    ]
    outputs[1] = outputs[1][:3]  # a text that ends early
    found = round_tokens(model, prompts, outputs, sampler, longest)
    assert list(found) == [1, 2, 3, 4, 5]
    games = 1 if temperature == 0 else 3000
    for e, of_exit in found.items():
        overlaps = []
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = torch.tensor([prompt + output])
            with torch.no_grad():
                logits = [model(tokens)[0], model(tokens, exit_layer=e)[0]]
            overlap = []
            for row in range(len(prompt), tokens.shape[1] - 1):
                if temperature == 0:
                    overlap.append(float(logits[0][row].argmax() == logits[1][row].argmax()))
                    continue
                p, q = (
                    torch.where(x[row] >= x[row].topk(20).values[-1], x[row], -torch.inf).softmax(-1) for x in logits
                )
                overlap.append(torch.minimum(p, q).sum().item())
            overlaps.append(overlap)
        for d in range(1, longest + 1):
            generator = random.Random(d)
            played = [rounds_by_chance(o, d, generator) for _ in range(games) for o in overlaps]
            expected = games * sum(map(len, overlaps)) / sum(played)
            assert of_exit[d - 1] == pytest.approx(expected, rel=1e-6 if temperature == 0 else 0.02)
    assert found[5][0] > found[1][0]  # the later exit knows more


def test_rounds_by_hand():
    assert count_rounds([1, 1, 1, 1, 1, 1], 2) == 2  # three tokens each
    assert count_rounds([0, 0, 0], 4) == 3
    assert count_rounds([1, 1, 0, 1], 4) == 2  # rejected at the third, one more
    assert count_rounds([0.5, 1], 1) == 1 + 0.5  # half of the time the first one is rejected
    assert count_rounds([], 3) == 0


def test_the_prediction_of_tokens_is_what_decoding_does():
    """Greedy, the same rounds."""
    model = small_layers(make_tiny())
    prompts = [[i, i + 1, i + 2] for i in range(1, 60, 16)]
    outputs = [generate(model, p, 40).tokens[0, 3:].tolist() for p in prompts]
    found = round_tokens(model, prompts, outputs, Sampler(0.0))[4]
    for d in (1, 3, 8):
        stats = [generate(model, p, 40, exit_layer=4, num_speculations=d).stats for p in prompts]
        measured = sum(s.tokens - s.first_tokens for s in stats) / sum(s.rounds for s in stats)
        assert 1.2 < measured < d + 1
        assert found[d - 1] == pytest.approx(measured)


def test_costs_of_the_form_are_found_and_the_best_pair_with_them():
    """Layers of 1 ms, a head of 2, a verified position of 0.1 of a layer: seconds by the formula."""

    def seconds(e, d):
        return 1e-3 * (d * (e + 2) + (32 - e) * (1 + 0.1 * d) + 5)

    cost = round_cost({pair: seconds(*pair) for pair in probes(32)})
    tokens = {e: [sum(min(0.3 + 0.02 * e, 1) ** k for k in range(d + 1)) for d in range(1, 13)] for e in range(1, 32)}
    ranked = predict(tokens, cost, step_s=0.036)
    best = max(((e, d) for e in tokens for d in range(1, 13)), key=lambda p: tokens[p[0]][p[1] - 1] / seconds(*p))
    assert ranked[0].pair == Pair(*best)
    first = ranked[0]
    assert first.round_s == pytest.approx(seconds(*best))
    assert first.speedup == pytest.approx(0.036 * tokens[best[0]][best[1] - 1] / seconds(*best))
    assert [one.speedup for one in ranked] == sorted((one.speedup for one in ranked), reverse=True)
    chosen = choose(ranked, 4)
    assert chosen[0] == first and len(chosen) == 4
    for a in chosen:
        for b in chosen:
            same_exit = a != b and a.pair.exit_layer == b.pair.exit_layer
            assert not same_exit or abs(a.pair.num_speculations - b.pair.num_speculations) >= 3


def tuning_config(folder, checkpoint, extends, **changes):
    settings = {"tune": True, "tune_extends": extends, **changes}
    return BenchmarkConfig.load(load_config(str(benchmark_config(folder, checkpoint, **settings))))


INT8 = {"_component_": "torchao.quantization.Int8WeightOnlyConfig"}


@pytest.mark.parametrize("best", [SelfSpeculation(exit_layer=3, num_speculations=5, draft_quantizer=INT8), None])
def test_the_config_extends_the_users(best, tmp_path, tokenizer_folder, monkeypatch):
    """It loads, validates, keeps the user's keys, and sets the choice and what it was measured with; null where nothing
    pays."""
    checkpoint = make_checkpoint(tmp_path / "model", tokenizer_folder)
    others = {"exit_layer": 2, "num_speculations": 2, "prompt_lookup": 3}
    theirs = {"max_new_tokens": 17, "compile": True, "top_p": 0.5, "repetition_penalty": 1.5, "quantizer": INT8}
    generate_config(tmp_path, checkpoint, **theirs, self_speculation=others)
    monkeypatch.chdir(tmp_path)  # a relative path, and read from another folder
    measured = {"temperatures": [0.8, 0.0], "top_k": 50, "batch_size": 2}
    cfg = tuning_config(tmp_path, checkpoint, "generate.yaml", **measured)
    write_config(tmp_path / "a" / "tuned.yaml", cfg, best, "because")
    monkeypatch.chdir("/")
    written = GenerateConfig.load(load_config(str(tmp_path / "a" / "tuned.yaml")))
    assert written.max_new_tokens == 17
    assert (written.temperature, written.top_k, written.batch_size, written.compile) == (0.8, 50, 2, False)
    # Keys that were not measured are off, also where the user has them on.
    assert written.top_p is written.repetition_penalty is written.quantizer is None
    assert written.self_speculation == best
    assert "because" in (tmp_path / "a" / "tuned.yaml").read_text()


def test_the_config_takes_the_place_of_an_exit(tmp_path, tokenizer_folder):
    checkpoint = make_checkpoint(tmp_path / "model", tokenizer_folder)
    user = generate_config(tmp_path, checkpoint, exit_layer=2, self_speculation=None)
    cfg = tuning_config(tmp_path, checkpoint, str(user), compile=True)
    write_config(tmp_path / "tuned.yaml", cfg, Pair(1, 2).variant, "because")
    written = GenerateConfig.load(load_config(str(tmp_path / "tuned.yaml")))
    assert written.compile is True and written.exit_layer is None
    cfg = tuning_config(tmp_path, checkpoint, "quickstart/generate")
    write_config(tmp_path / "ours.yaml", cfg, None, "because")
    assert load_config(str(tmp_path / "ours.yaml")).self_speculation is None
    cfg = tuning_config(tmp_path, checkpoint, str(user), tune=False, sweep={}, quantizer=INT8)
    write_config(tmp_path / "int8.yaml", cfg, None, "because")
    assert load_config(str(tmp_path / "int8.yaml")).quantizer == INT8


def test_the_recipe_measures_the_best_and_writes_the_fastest(tmp_path, tokenizer_folder, capsys):
    checkpoint = make_checkpoint(tmp_path / "model", tokenizer_folder)
    user = generate_config(tmp_path / "user", checkpoint, compile=True)
    path = benchmark_config(
        tmp_path, checkpoint, tune=True, tune_extends=str(user), max_new_tokens=24, temperatures=[0.0, 0.8], repeats=1
    )
    recipe = LayerSkipBenchmark(load_config(str(path)))
    recipe.setup()
    report = recipe.benchmark()
    variants = [row for row in report["results"] if row["kind"] == "variant"]
    rows = {row["name"]: row["speedup"]["median"] for row in variants if row["temperature"] == 0}
    # Predicted is what the choice is for.
    predicted = {(row["temperature"], row["name"]) for row in variants if row["predicted_speedup"]}
    assert predicted == {(0.0, name) for name in rows}
    assert set(rows) == set(recipe.variants) == set(recipe.predictions)
    fastest = max(rows, key=rows.get)
    cfg = GenerateConfig.load(load_config(str(tmp_path / "report" / "tuned.yaml")))
    assert cfg.compile is False  # as it was measured
    assert cfg.self_speculation == (recipe.variants[fastest] if rows[fastest] > 1 else None)
    out = capsys.readouterr().out
    assert "predicted" in out and "measured" in out
    # Beside the report of the same config without tune.
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"tune.json", "tune.md", "tune.png", "tuned.yaml"}
    assert json.loads((tmp_path / "report" / "tune.json").read_text())["results"] == json.loads(
        json.dumps(report["results"])
    )
    LayerSkipBenchmark(load_config(str(path)))  # its own config may be written again


@pytest.mark.parametrize(
    ("name", "what"), [("user", "is a folder"), ("notes.txt", "is there, and layerskip_benchmark")]
)
def test_a_file_of_somebody_elses_is_not_overwritten(name, what, tmp_path, tokenizer_folder):
    """Said before anything is measured; without tune no config is written."""
    checkpoint = make_checkpoint(tmp_path / "model", tokenizer_folder)
    user = generate_config(tmp_path / "user", checkpoint)
    (tmp_path / "notes.txt").write_text("mine\n")
    settings = {"tune": True, "tune_extends": str(user), "tune_file": str(tmp_path / name)}
    with pytest.raises(ValueError, match=rf"^tune_file: '.*{name}' {what}.*; for example tune_file=\S+$"):
        LayerSkipBenchmark(load_config(str(benchmark_config(tmp_path, checkpoint, **settings))))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "tuned.yaml").write_text("mine\n")
    LayerSkipBenchmark(load_config(str(benchmark_config(tmp_path, checkpoint))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune_extends": None}, "^tune: True needs .*tune_extends=quickstart/generate"),
        ({"tune_extends": "quickstart/generates"}, "^tune_extends: .*Nearest: quickstart/generate"),
        ({"tune_extends": "quickstart/finetune"}, "^tune_extends: quickstart/finetune is no generation .*unknown"),
        ({"tune": 3}, "^tune: 3"),
    ],
)
def test_mistakes(changes, message, tmp_path, tokenizer_folder):
    checkpoint = make_checkpoint(tmp_path / "model", tokenizer_folder)
    settings = {"tune": True, "tune_extends": "quickstart/generate"} | changes
    with pytest.raises(ValueError, match=message):
        LayerSkipBenchmark(load_config(str(benchmark_config(tmp_path, checkpoint, **settings))))


def test_outputs_of_one_token():
    model = small_layers(make_tiny())
    with pytest.raises(ValueError, match=r"^max_new_tokens: every output ended with its first token"):
        round_tokens(model, [[1, 2]], [[3]], Sampler(0.0))
