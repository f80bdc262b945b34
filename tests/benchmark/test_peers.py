"""Other libraries in the benchmark: their fastest setting, those that fail, and checkpoints that they cannot open."""

from pathlib import Path

import pytest
from helpers.configs import benchmark_config, make_checkpoint

from layerskip_recipes.benchmark import peers
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.checkpoint.export import export
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.stats import GenerationStats

pytestmark = pytest.mark.slow

CHECKPOINTER = "torchtune.training.FullModelHFCheckpointer"


@pytest.fixture
def path(tmp_path, checkpoint) -> Path:
    return benchmark_config(tmp_path, checkpoint)


def run(path: Path, *overrides: str) -> dict:
    recipe = LayerSkipBenchmark(load_config(str(path), overrides))
    recipe.setup()
    return recipe.benchmark()


def rows(report: dict, temperature: float) -> list[str]:
    return [row["name"] for row in report["results"] if row["temperature"] == temperature]


def test_a_peer_that_is_not_there_or_fails_is_left_out(path, monkeypatch):
    def broken(job, compiled):
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "transformers" else True)
    monkeypatch.setitem(peers.PEERS, "torchtune", peers.PeerKind("torchtune", broken))
    report = run(path, "peers=[torchtune,transformers]", "temperatures=[0.0]", "repeats=1")
    assert rows(report, 0.0) == ["baseline", "chain", "tree"] and "transformers" not in report["versions"]
    left_out = {"torchtune": "RuntimeError: eager: RuntimeError: no such kernel"}
    left_out["transformers"] = "ModuleNotFoundError: transformers is not installed"
    assert report["peers_left_out"] == left_out
    assert "transformers is left out" in (path.parent / "report/benchmark.md").read_text()


def replace_torchtune(monkeypatch, fails) -> list[float]:
    """Replaces the peer by one that decodes nothing; fails(call, temperature) says whether it raises.

    Returns:
        The temperatures of its calls; the first two are its trial.
    """
    calls = []

    def decode(prompts, sampler, seed):
        calls.append(sampler.temperature)
        if fails(len(calls), sampler.temperature):
            raise MemoryError("no more\nmemory")
        return [[1, 2] for _ in prompts], GenerationStats(tokens=2, first_tokens=1, decode_s=1.0)

    monkeypatch.setitem(peers.PEERS, "torchtune", peers.PeerKind("torchtune", lambda job, compiled: decode))
    return calls


def test_a_peer_that_works_at_one_temperature_only_is_in_no_table(path, monkeypatch):
    """It fails in the warm-up of the second one; what it made at the first one compares with nothing."""
    replace_torchtune(monkeypatch, lambda call, temperature: temperature > 0)
    report = run(path, "peers=[torchtune]", "repeats=1")
    assert report["peers_left_out"] == {"torchtune": "MemoryError: no more, at temperature 0.8"}
    assert [row["name"] for row in report["results"]] == ["baseline", "chain", "tree"] * 2


def test_a_peer_that_fails_later_takes_nothing_with_it(path, monkeypatch):
    """In its trial (2 calls), in the warm-up and turns of the first temperature (2 + 4) it works; then no more."""
    calls = replace_torchtune(monkeypatch, lambda call, temperature: call > 2 + 6 + 3)
    report = run(path, "peers=[torchtune]")
    assert calls == [0.0, 0.0] + [0.0] * 6 + [0.8] * 4
    assert report["peers_left_out"] == {"torchtune": "MemoryError: no more, at temperature 0.8"}
    assert [(row["name"], row["outputs"]) for row in report["results"]] == [
        *((name, 4) for name in ["baseline", "chain", "tree"] * 2)
    ]
    assert report["interrupted"] is False


@pytest.mark.parametrize("fastest", ["eager", "compiled"])
def test_the_fastest_setting_of_a_peer_wins(fastest):
    """By the second call of each."""
    calls = []

    def decoder(job, compiled):
        def decode(prompts, sampler, seed):
            calls.append(compiled)
            quick = ("compiled" if compiled else "eager") == fastest
            seconds = 100.0 if calls.count(compiled) == 1 else 1.0 if quick else 2.0
            return [[1, 2]], GenerationStats(tokens=11, first_tokens=1, decode_s=seconds)

        return decode

    job = peers.Job(*[None] * 8)
    peer = peers.fastest_setting(peers.PeerKind("torchtune", decoder), job, None, compile=True)
    assert peer.setting == fastest and sorted(peer.trial.values()) == [5.0, 10.0]


def test_a_setting_that_fails_is_noted():
    def decoder(job, compiled):
        def decode(prompts, sampler, seed):
            if compiled:
                raise RuntimeError("no compiler")
            return [[1, 2]], GenerationStats(tokens=11, first_tokens=1, decode_s=1.0)

        return decode

    job = peers.Job(*[None] * 8)
    peer = peers.fastest_setting(peers.PeerKind("torchtune", decoder), job, None, compile=True)
    assert peer.setting == "eager" and peer.trial == {"eager": 10.0, "compiled": "RuntimeError: no compiler"}


def test_what_a_peer_cannot_do_leaves_it_out(path):
    """Filters that torchtune lacks, and a draft that no variant has; ours are measured."""
    alone = ["variants.chain=null", "variants.tree=null", "variants.x.early_exit=2", "max_new_tokens=4", "repeats=1"]
    report = run(path, *alone, "peers=[torchtune,transformers_early_exit]", "temperatures=[0.8]", "top_p=0.9")
    assert [row["name"] for row in report["results"]] == ["baseline", "x"]
    why = report["peers_left_out"]
    assert "torchtune has no top_p" in why["torchtune"] and "none has one" in why["transformers_early_exit"]


def test_adapters_are_not_the_peers_model():
    section = Component({"_component_": CHECKPOINTER, "checkpoint_dir": "/base", "adapter_checkpoint": "/adapters"})
    with pytest.raises(ValueError, match=r"it would run the base without checkpointer.adapter_checkpoint"):
        peers.check_same_model("torchtune", section)


def test_peers_alone(path):
    settings = ["variants=null", "max_new_tokens=4", "repeats=1", "temperatures=[0.0]", "peers=[torchtune]"]
    assert [row["name"] for row in run(path, *settings)["results"]] == ["baseline", "torchtune"]


def test_a_quantised_model_is_llama_cpps_only(path):
    """llama.cpp reads a GGUF file of its own."""
    int8 = "quantizer._component_=torchao.quantization.Int8WeightOnlyConfig"
    settings = ["variants.tree=null", "max_new_tokens=6", "repeats=1", "temperatures=[0.0]", "peers=[torchtune]"]
    report = run(path, int8, *settings)
    assert {row["name"]: row["identical"] for row in report["results"]} == {"baseline": True, "chain": True}
    assert "it would run the weights without quantizer" in report["peers_left_out"]["torchtune"]
    section = Component({"_component_": CHECKPOINTER, "checkpoint_dir": str(path.parent)})
    peers.check_same_model("xllamacpp", section, quantised=True)


def test_transformers_would_add_adapters_to_merged_weights(tmp_path, tokenizer_folder):
    """A LoRA training's epoch_N has them beside the weights; what `layerskip export` makes of it has not."""
    folder = make_checkpoint(tmp_path / "epoch_0", tokenizer_folder)
    (folder / "adapter_config.json").write_text("{}")
    section = Component({"_component_": CHECKPOINTER, "checkpoint_dir": str(folder)})
    with pytest.raises(ValueError, match=f"it would add the adapters in {folder} .*`layerskip export`"):
        peers.check_same_model("transformers", section)
    peers.check_same_model("torchtune", section)
    exported = export(str(folder), str(tmp_path / "exported"))
    peers.check_same_model("transformers", Component({"_component_": CHECKPOINTER, "checkpoint_dir": str(exported)}))
