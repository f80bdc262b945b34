"""`layerskip decoding-cost`: what rounds of drafts cost, with random weights."""

import functools
import json
from pathlib import Path

import pytest
import torch
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes.benchmark import decoding_cost
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.stats import GenerationStats

TINY = ("model.num_layers=4", "self_speculation.exit_layer=2", "compile=false")


@pytest.fixture
def cost(layerskip):
    """Runs `layerskip decoding-cost quickstart/generate ARGS` in an empty folder: exit status, stdout, stderr."""
    return functools.partial(layerskip, "decoding-cost", "quickstart/generate")


def test_it_needs_no_weights(cost, monkeypatch):
    """Every exit with every number of drafts has a row; figures follow from the times; the last line is a document."""
    generations, new = [], decoding_cost.Generation

    def noted(*args, **kwargs):
        generations.append(new(*args, **kwargs))
        return generations[-1]

    monkeypatch.setattr(decoding_cost, "Generation", noted)
    options = ["--drafts", "3,1", "--text", "20", "--rounds", "2", "--repeats", "2"]
    status, out, _ = cost(*TINY, "self_speculation.exit_layer=[2,1]", *options)
    report = json.loads(out.splitlines()[-1])
    assert status == 0 and list(Path().iterdir()) == []
    shown = [line.split()[:2] for line in out.splitlines()[3:-1]]
    rows = [(row["exit_layer"], row["num_speculations"]) for row in report["rounds"]]
    assert rows == [(2, 3), (2, 1), (1, 3), (1, 1)] and shown == [[str(e), str(d)] for e, d in rows]

    model = llama3_2(
        vocab_size=2048, num_layers=4, num_heads=2, num_kv_heads=2, embed_dim=128, max_seq_len=64, intermediate_dim=384
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    assert report["parameters"] == count
    # All weights but the norms, and the keys and values of the text.
    assert 4 * count < report["step_bytes"] < 4 * count + 4 * 2 * 4 * 128 * 30
    for row in report["rounds"]:
        d, step = row["num_speculations"], report["step_s"]
        assert row["draft_cost"] == pytest.approx(row["draft_s"] / step)
        ideal, measured = (0.7 * d + 1) / (d * row["draft_cost"] + 1), (0.7 * d + 1) * step / row["round_s"]
        assert row["speedup"]["0.7"] == pytest.approx(measured)
        assert row["engine_efficiency"] == pytest.approx(measured / ideal)

    # A first turn that does not count and two that do, of the plain way and four others; all rounds are whole ones.
    assert len(generations) == 3 * 5
    for i, generation in enumerate(generations):
        stats, way = generation.stats, i % 5
        assert stats.rounds == 2 and not any(generation.finished)
        assert stats.drafted == (0 if way == 0 else 2 * rows[way - 1][1])


def test_medians_of_the_repeats(monkeypatch):
    """By hand: plain steps of 2 s; rounds of 3 drafts of .2 s, 2.4 s to verify, 3.5 s in all; a repeat is off."""
    made = []

    class Fake:
        def __init__(self, model, prompts, limit, *, speculation, **_):
            made.append(speculation)
            slow = 10.0 if 2 <= len(made) - 1 < 4 else 1.0  # the second turn, the first that counts
            self.stats = GenerationStats(rounds=5, decode_s=5 * 2.0 * slow)
            if speculation is not None:
                times = {"draft_s": 15 * 0.2 * slow, "verify_s": 5 * 2.4 * slow, "decode_s": 5 * 3.5 * slow}
                self.stats = GenerationStats(rounds=5, draft_steps=15, **times)

        def __iter__(self):
            yield from range(6)

    monkeypatch.setattr(decoding_cost, "Generation", Fake)
    report = decoding_cost.measure(load_config("quickstart/generate", list(TINY)), [3], text=4, rounds=5, repeats=3)
    assert len(made) == 2 * 4 and report["step_s"] == pytest.approx(2.0)
    (row,) = report["rounds"]
    expected = {"draft_s": 0.2, "draft_cost": 0.1, "verify_s": 2.4, "round_s": 3.5, "engine_efficiency": 1.3 * 2 / 3.5}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["speedup"] == pytest.approx({"0.5": 2.5 * 2 / 3.5, "0.7": 3.1 * 2 / 3.5, "0.9": 3.7 * 2 / 3.5})


def test_whatever_a_config_says_of_drafts(cost):
    """Batches, trees, sampling, draft vocabulary, int8; a threshold and look-ups only choose between such rounds."""
    section = "self_speculation.tree_width=2 self_speculation.tree_children=2 self_speculation.draft_vocabulary=64"
    quantizer = "self_speculation.draft_quantizer={_component_: torchao.quantization.Int8WeightOnlyConfig}"
    options = ["--drafts", "2", "--text", "8", "--rounds", "1", "--repeats", "1"]
    status, out, _ = cost(*TINY, *section.split(), quantizer, "batch_size=3", "temperature=0.8", *options)
    assert status == 0 and json.loads(out.splitlines()[-1])["batch_size"] == 3
    chosen = ["self_speculation.threshold=0.4", "self_speculation.prompt_lookup=2"]
    status, out, _ = cost(*TINY, *chosen, *options)
    assert status == 0 and len(json.loads(out.splitlines()[-1])["rounds"]) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["self_speculation=null"], "self_speculation: missing, and its rounds are what is measured; for example"),
        (["self_speculation.exit_layer=9"], "self_speculation.exit_layer: 9"),
        (["--drafts", "0"], "--drafts: '0' is not allowed. Allowed: numbers from 1 on; for example --drafts 2,4,6"),
        (["--drafts", "2, 4"], "--drafts: '2, 4' is not allowed"),
        (["--text", "0"], "--text: 0"),
        (["--rounds", "0"], "--rounds: 0"),
        (["--text", "950"], "--text: 950 tokens and up to 120 of 16 rounds make 1070, more than the model's 1024"),
        (["self_speculation.tree_width=99999"], "self_speculation.tree_width: 99999"),
    ],
)
def test_a_mistake_is_one_line(args, message, cost):
    status, out, err = cost(*TINY, *args)
    assert status == 1 and out == "" and err.startswith("ValueError: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(cost):
    options = ["--drafts", "2", "--text", "8", "--rounds", "4", "--repeats", "1"]
    status, out, _ = cost(*TINY[:2], "device=cuda", "dtype=bf16", "compile=true", *options)
    report = json.loads(out.splitlines()[-1])
    assert status == 0 and report["compiled"] and 0 < report["rounds"][0]["draft_cost"] < 1
