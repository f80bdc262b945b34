"""Other libraries in the benchmark: their fastest setting, those that fail, and checkpoints that they cannot open."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.configs import benchmark_config, make_checkpoint
from helpers.recipes import run_benchmark

from layerskip_recipes.benchmark import peers
from layerskip_recipes.checkpoint.export import export
from layerskip_recipes.config.components import Component
from layerskip_recipes.generation.stats import GenerationStats

pytestmark = pytest.mark.slow

OURS = ["baseline", "chain", "short"]


@pytest.fixture
def path(tmp_path, checkpoint) -> Path:
    return benchmark_config(tmp_path, checkpoint)


def run(path: Path, *overrides: str) -> dict:
    return run_benchmark(path, *overrides)[1]


JOB = peers.Job(*[None] * 6, exits=[3, 6])


def test_a_peer_that_is_not_there_or_fails_is_left_out(path, monkeypatch):
    def broken(job, compiled):
        raise RuntimeError("no such kernel\nmore")

    def missing(job, compiled):
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setitem(peers.PEERS, "torchtune", peers.PeerKind("torchtune", broken))
    monkeypatch.setitem(peers.PEERS, "transformers", peers.PeerKind("transformers", missing))
    report = run(path, "peers=[torchtune,transformers]", "temperatures=[0.0]", "repeats=1")
    assert [row["name"] for row in report["results"]] == OURS and "transformers" not in report["versions"]
    why = {"torchtune": "RuntimeError: no such kernel"}
    why["transformers"] = "ModuleNotFoundError: No module named 'transformers'"
    left_out = {name: f"RuntimeError: eager: {error}, at temperature 0.0" for name, error in why.items()}
    assert report["peers_left_out"] == left_out
    assert "transformers is left out" in (path.parent / "report/benchmark.md").read_text()


def test_a_peer_that_fails_later_takes_nothing_with_it(path, monkeypatch):
    """After its trials (2 calls each), warm-up and turns of the first temperature (2 + 4). One that fails in the
    trial of the second temperature does not run at the first one either."""
    calls = []

    def decode(prompts, sampler, seed):
        calls.append(sampler.temperature)
        if len(calls) == fails:
            raise MemoryError("no more\nmemory")
        return [[1, 2] for _ in prompts], GenerationStats(tokens=2, first_tokens=1, decode_s=1.0)

    monkeypatch.setitem(peers.PEERS, "torchtune", peers.PeerKind("torchtune", lambda job, compiled: decode))
    fails = 4 + 6 + 4
    report = run(path, "peers=[torchtune]")
    assert calls == [0.0, 0.0, 0.8, 0.8] + [0.0] * 6 + [0.8] * 4
    assert report["peers_left_out"] == {"torchtune": "MemoryError: no more, at temperature 0.8"}
    assert [(row["name"], row["outputs"]) for row in report["results"]] == [(name, 4) for name in OURS * 2]
    assert report["interrupted"] is False
    calls.clear()
    fails = 3
    report = run(path, "peers=[torchtune]", "repeats=1")
    assert calls == [0.0, 0.0, 0.8]
    assert report["peers_left_out"] == {"torchtune": "RuntimeError: eager: MemoryError: no more, at temperature 0.8"}
    assert [row["name"] for row in report["results"]] == OURS * 2


def timed_decoder(rates: dict, calls: list):
    """A peer that decodes so many tokens per second by (compiled, arguments); a setting that is missing fails."""

    def decoder(job, compiled, **arguments):
        setting = (compiled, *arguments.values())

        def decode(prompts, sampler, seed):
            calls.append(setting)
            if setting not in rates:
                raise RuntimeError("no compiler")
            warm = calls.count(setting) > 1
            return [[1, 2]], GenerationStats(tokens=11, first_tokens=1, decode_s=10 / rates[setting] if warm else 99.0)

        return decode

    return decoder


@pytest.mark.parametrize(
    ("rates", "setting", "compiled"),
    [
        ({(False,): 5.0, (True,): 10.0}, "compiled", 10.0),
        ({(False,): 10.0, (True,): 5.0}, "eager", 5.0),
        ({(False,): 10.0}, "eager", "RuntimeError: no compiler"),
    ],
)
def test_the_fastest_setting_of_a_peer_wins(rates, setting, compiled, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "torchtune", peers.PeerKind("torchtune", timed_decoder(rates, [])))
    peer = peers.fastest_setting("torchtune", JOB, None, compile=True)
    assert peer.setting == setting and peer.trial == {"eager": rates[False,], "compiled": compiled}


def test_exits_and_draft_lengths_are_searched_and_the_best_is_compiled(monkeypatch):
    rates = {(False, e, n): 1.0 * e + n for e in (3, 6) for n in (2, 4, 6)} | {(False, 3, 4): 20.0, (True, 3, 4): 30.0}
    name = "transformers_early_exit"
    monkeypatch.setitem(peers.PEERS, name, peers.PeerKind("torchtune", timed_decoder(rates, calls := [])))
    peer = peers.fastest_setting(name, JOB, None, compile=True)
    assert peer.setting == "exit 3, 4 drafts, compiled" and len(peer.trial) == 7
    assert set(calls) == set(rates)
    assert peers.fastest_setting(name, JOB, None, compile=False).setting == "exit 3, 4 drafts"
    for draft, expected in (("draft.gguf", ["plain", "2 drafts", "4 drafts", "6 drafts"]), (None, ["plain"])):
        files = SimpleNamespace(llama_cpp=SimpleNamespace(gguf="model.gguf", draft=draft))
        assert list(peers.settings_to_try("llama_cpp", replace(JOB, cfg=SimpleNamespace(peers=files)))) == expected


def test_each_temperature_has_its_own_fastest_setting(path, monkeypatch):

    def decoder(job, compiled, exit_layer, length):
        def decode(prompts, sampler, seed):
            seconds = 1 / length if sampler.greedy else float(length)
            return [[1, 2] for _ in prompts], GenerationStats(tokens=2, first_tokens=1, decode_s=seconds)

        return decode

    kind = replace(peers.PEERS["transformers_early_exit"], decoder=decoder)
    monkeypatch.setitem(peers.PEERS, "transformers_early_exit", kind)
    report = run(path, "peers=[transformers_early_exit]", "repeats=1", "max_new_tokens=4")
    settings = [row["setting"].split(", ")[1] for row in report["results"] if row["kind"] == "peer"]
    assert settings == ["6 drafts", "2 drafts"]


def test_what_a_peer_cannot_do_leaves_it_out(path):
    alone = ["variants=null", "max_new_tokens=4", "repeats=1"]
    report = run(path, *alone, "peers=[torchtune,transformers_early_exit]", "temperatures=[0.8]", "top_p=0.9")
    assert [row["name"] for row in report["results"]] == ["baseline"]
    why = report["peers_left_out"]
    assert "torchtune has no top_p" in why["torchtune"]
    assert "no variant has an exit_layer" in why["transformers_early_exit"]


def test_peers_alone_and_a_quantised_model(path):
    settings = ["max_new_tokens=4", "repeats=1", "temperatures=[0.0]", "peers=[torchtune]"]
    assert [row["name"] for row in run(path, *settings, "variants=null")["results"]] == ["baseline", "torchtune"]
    report = run(path, *settings, "quantizer._component_=torchao.quantization.Int8WeightOnlyConfig")
    assert {row["name"]: row["identical"] for row in report["results"]} == dict.fromkeys(OURS, True)
    assert "it would run the weights without quantizer" in report["peers_left_out"]["torchtune"]


def test_whose_weights_a_peer_would_run(tmp_path, tokenizer_folder):
    """A LoRA training's epoch_N has adapters beside the weights, which transformers would add once more; an exported
    folder has not. llama.cpp reads a GGUF file of its own."""

    def section(folder, **more):
        reader = "torchtune.training.FullModelHFCheckpointer"
        return Component({"_component_": reader, "checkpoint_dir": str(folder), **more})

    with pytest.raises(ValueError, match=r"it would run the base without checkpointer.adapter_checkpoint"):
        peers.check_same_model("torchtune", section("/base", adapter_checkpoint="/adapters"))
    folder = make_checkpoint(tmp_path / "epoch_0", tokenizer_folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"it would add the adapters in {folder} .*`layerskip export`"):
        peers.check_same_model("transformers", section(folder))
    peers.check_same_model("torchtune", section(folder))
    peers.check_same_model("transformers", section(export(str(folder), str(tmp_path / "exported"))))
    peers.check_same_model("xllamacpp", section(folder), quantised=True)
