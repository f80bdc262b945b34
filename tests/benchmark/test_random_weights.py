"""`layerskip_benchmark random_weights=true`: what rounds of drafts cost, before there is a checkpoint."""

import json
from pathlib import Path

import pytest
from helpers.recipes import run_benchmark
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation import llm

TINY = (
    *("random_weights=true", "model.num_layers=4", "self_speculation.exit_layer=2", "compile=false"),
    *("max_new_tokens=8", "prompt_tokens=20", "repeats=2"),
)


def run(*overrides: str) -> dict:
    return run_benchmark("quickstart/generate", *TINY, *overrides)[1]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_random_weights_need_no_checkpoint_and_no_tokenizer(monkeypatch, capsys):
    """A generation config will do: neither checkpoint nor tokenizer is there, and no file is written."""
    generations, new = [], llm.Generation

    def noted(*args, **kwargs):
        generations.append(new(*args, **kwargs))
        return generations[-1]

    monkeypatch.setattr(llm, "Generation", noted)
    report = run("self_speculation.num_speculations=3")
    assert list(Path().iterdir()) == []
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == json.loads(json.dumps(report))
    model = llama3_2(
        vocab_size=2048, num_layers=4, num_heads=2, num_kv_heads=2, embed_dim=128, max_seq_len=64, intermediate_dim=384
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    assert report["parameters"] == count and f"{count / 1e6:.0f} million random weights" in printed
    plain, drafts = report["results"]
    assert (plain["name"], drafts["name"]) == ("baseline", "self_speculation")
    # All weights but the norms, and the keys and values of the text.
    assert 4 * count < plain["bytes_per_token"] < 4 * count + 4 * 2 * 4 * 128 * 32
    step = plain["round_s"]
    assert drafts["draft_cost"] == pytest.approx(drafts["draft_s_per_round"] / 3 / step)
    assert drafts["speedup_by_acceptance"]["0.7"] == pytest.approx((0.7 * 3 + 1) * step / drafts["round_s"])
    assert plain["speedup_by_acceptance"] is None
    # Two warm-ups and two repeats of both methods, in turns, and no round is cut short by the end of the text.
    assert len(generations) == 2 * 4
    for i, generation in enumerate(generations):
        assert not any(generation.finished)
        assert generation.stats.drafted == (3 * generation.stats.rounds if i % 2 else 0)


@pytest.mark.slow
def test_random_weights_draft_as_the_config_says():
    """Batches, sampling, draft vocabulary, int8; look-ups only choose between such rounds. Files go to report_dir."""
    drafts = ("draft_vocabulary=64", "draft_int8=true", "num_speculations=2")
    settings = [f"self_speculation.{draft}" for draft in drafts]
    report = run(*settings, "batch_size=3", "temperature=0.8", "repeats=1")
    assert report["batch_size"] == 3 and {row["temperature"] for row in report["results"]} == {0.8}
    own = ["self_speculation=null", "variants.a={exit_layer: 1, num_speculations: 2}", "variants.b.exit_layer=2"]
    report = run(*own, "repeats=1", "report_dir=out", "picture=out/x.png")
    assert [row["name"] for row in report["results"]] == ["baseline", "a", "b"]
    assert {path.name for path in Path("out").iterdir()} == {"benchmark.json", "benchmark.md", "x.png"}
    missing = ["max_new_tokens=auto", "~self_speculation.exit_layer", "self_speculation.num_speculations=2"]
    report = run(*missing, "prompt_tokens=8", "repeats=1")
    assert report["max_new_tokens"] == 128 and report["results"][1]["drafted_per_round"] == 2
    report = run("self_speculation.prompt_lookup=2", "repeats=1")
    drafted = load_config("quickstart/generate").self_speculation.num_speculations
    assert report["results"][1]["drafted_per_round"] == drafted
