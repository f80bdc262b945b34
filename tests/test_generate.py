"""The generate and eval recipes: prompts, stops, streaming, the comparison, the report, and the exits' measurement."""

import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from configs import MODEL, eval_config, generate_config, make_checkpoint
from conftest import run_tune
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.generation import generate as torchtune_generate

from layerskip_recipes import generate
from layerskip_recipes.config import load_config
from layerskip_recipes.recipes.eval import LayerSkipEval
from layerskip_recipes.recipes.generate import LayerSkipGenerate
from layerskip_recipes.recipes.stream import TextStream

MODES = {
    "autoregressive": ["self_speculation=null"],
    "early exit": ["self_speculation=null", "exit_layer=3"],
    "self-speculative": [],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "folder", tokenizer_folder)


def run(path: Path, *overrides: str) -> tuple[LayerSkipGenerate, dict]:
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    return recipe, recipe.generate()


@pytest.fixture
def path(tmp_path, checkpoint) -> Path:
    return generate_config(tmp_path, checkpoint, max_new_tokens=24)


def test_greedy_output_is_torchtunes(path, capsys):
    """The text on stdout is that of `torchtune.generation.generate`, and the last line is the report."""
    recipe, report = run(path, "benchmark.compare=true")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == report
    expected, _ = torchtune_generate(
        recipe.model,
        torch.tensor(recipe.prompt_tokens[0]),
        max_generated_tokens=24,
        top_k=1,
        stop_tokens=recipe.stop_tokens,
    )
    expected = expected[0, len(recipe.prompt_tokens[0]) :].tolist()
    assert report["tokens"] == report["baseline_tokens"] == len(expected)
    assert report["identical"] is True and report["speedup"] > 0
    text = recipe.tokenizer.decode([token for token in expected if token not in recipe.stop_tokens])
    assert text.splitlines()[0] in "\n".join(lines)


def test_the_report_adds_up(path):
    _, report = run(path, "prompt=[import os, class A, x = 1]")
    assert report["prompts"] == 3
    assert report["acceptance_rate"] == report["accepted"] / report["drafted"]
    assert sum(report["accepted_histogram"]) == report["rounds"]
    assert sum(k * n for k, n in enumerate(report["accepted_histogram"])) == report["accepted"]
    # Each round gives its accepted tokens and one more; each prompt's first token comes from the prefill.
    assert report["tokens"] == report["accepted"] + report["rounds"] + 3
    assert report["peak_memory_bytes"] > 1e7 and report["prefill_s"] > 0 and report["decode_s"] > 0


def test_early_exit_takes_all_tokens_from_that_exit(path):
    recipe, report = run(path, *MODES["early exit"])
    expected = generate(
        recipe.model, torch.tensor(recipe.prompt_tokens[0]), 24, exit_layer=3, stop_tokens=recipe.stop_tokens
    )
    assert report["tokens"] == expected.tokens.shape[1] - len(recipe.prompt_tokens[0])
    assert report["acceptance_rate"] is None and report["drafted"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_seeds_make_sampling_reproducible(path, mode, capsys):
    texts = []
    for seed in (1, 1, 2):
        run(path, *MODES[mode], "temperature=0.9", "top_k=40", "top_p=0.95", f"seed={seed}")
        texts.append(capsys.readouterr().out.split("\n---")[1])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_stop_strings_end_the_text_before_them_in_every_mode(path, capsys, stream):
    recipe, _ = run(path, "self_speculation=null", "stream=false")
    stream_of = TextStream(recipe.tokenizer, recipe.stop_tokens)
    whole = stream_of.text(generate(recipe.model, torch.tensor(recipe.prompt_tokens[0]), 24).tokens[0].tolist())
    whole = whole[len("def main(") :]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    expected = whole[: whole.index(stop)]
    counts = []
    for mode in ("autoregressive", "self-speculative"):
        capsys.readouterr()
        _, report = run(path, *MODES[mode], f"stop_strings=[{json.dumps(stop)}]", f"stream={stream}")
        shown = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
        assert shown == expected
        counts.append(report["tokens"])
    assert counts[0] == counts[1] < 24


def test_stop_tokens_are_the_tokenizers_and_the_configs(path):
    recipe, report = run(path)
    output = (
        generate(recipe.model, torch.tensor(recipe.prompt_tokens[0]), 24)
        .tokens[0, len(recipe.prompt_tokens[0]) :]
        .tolist()
    )
    stop = output[7]
    _, stopped = run(path, f"stop_tokens=[{stop}]", "benchmark.compare=true")
    assert stopped["tokens"] == output.index(stop) + 1 < report["tokens"]
    assert stopped["identical"] is True


def test_prompt_files_and_standard_input(path, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("import sys\n")
    (tmp_path / "two.jsonl").write_text(
        '{"prompt": "import sys\\n"}\n\n{"prompt": {"user": "hi", "system": "be brief"}}\n'
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("import sys\n"))

    def prompts(name):
        return LayerSkipGenerate(load_config(str(path), [f"prompt_file={name}"])).prompts

    assert prompts(tmp_path / "one.txt") == prompts("-") == ["import sys\n"]
    assert prompts(tmp_path / "two.jsonl") == ["import sys\n", {"user": "hi", "system": "be brief"}]


def test_a_chat_prompt_goes_through_the_template(path, checkpoint, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<reply>{% endif %}"
    overrides = [f"tokenizer.chat_template={json.dumps(template)}", "prompt=null", "prompt.system=be", "prompt.user=hi"]
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    assert recipe.tokenizer.decode(recipe.prompt_tokens[0]) == "<system>be<user>hi<reply>"


def test_a_torchtune_quantizer_keeps_output_identical_to_the_quantised_model(path):
    _, report = run(
        path, "quantizer._component_=torchtune.training.quantization.Int8DynActInt4WeightQuantizer",
        "quantizer.groupsize=16", "benchmark.compare=true",
    )  # fmt: skip
    assert report["identical"] is True


def test_tune_run_prints_only_text_and_report_on_stdout(path, tmp_path):
    run_ = run_tune("run", "layerskip_generate", "--config", str(path), "benchmark.compare=true", cwd=tmp_path)
    assert run_.returncode == 0, run_.stderr[-2000:]
    assert run_.stdout.startswith("\n--- prompt 1 of 1\ndef main(\n>>> ")
    assert json.loads(run_.stdout.splitlines()[-1])["identical"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["generate.yaml"]


def test_eval_measures_every_exit(tmp_path, checkpoint, capsys):
    """Loss, accuracy and agreement by plain PyTorch over the same samples; the picture is a PNG."""
    path = eval_config(tmp_path, checkpoint, picture=str(tmp_path / "exits.png"))
    recipe = LayerSkipEval(load_config(str(path)))
    recipe.setup()
    report = recipe.evaluate()
    model = tune_config.instantiate(OmegaConf.create(MODEL))
    model.load_state_dict(recipe.model.state_dict())
    tokens = torch.tensor([sample["tokens"] for sample in recipe.batches.dataset])
    labels = tokens[:, 1:].flatten()
    with torch.no_grad():
        h, logits = model.tok_embeddings(tokens), {}
        for i, layer in enumerate(model.layers):
            h = layer(h)
            logits[i + 1] = model.output(model.norm(h))[:, :-1].flatten(0, 1)
    assert list(report["exits"]) == [1, 2, 3, 4]
    for e, quality in report["exits"].items():
        assert quality["loss"] == pytest.approx(F.cross_entropy(logits[e], labels).item(), abs=1e-4)
        agree = (logits[e].argmax(-1) == logits[4].argmax(-1)).float().mean().item()
        assert quality["agreement"] == pytest.approx(agree, abs=1e-3)
        assert quality["accuracy"] == pytest.approx((logits[e].argmax(-1) == labels).float().mean().item(), abs=1e-3)
    assert (tmp_path / "exits.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["batches"] == 2
