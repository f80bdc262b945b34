"""`layerskip_eval` on a dataset: the quality of each exit, reports and pictures, other checkpoints beside it."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers.configs import MODEL, SIZE, eval_config, make_checkpoint
from helpers.recipes import ready, run_eval
from helpers.tiny import exit_logits
from helpers.training import text_data
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.models.llama3_2 import llama3_2

from layerskip_recipes.acceptance.exit_quality import exit_quality
from layerskip_recipes.checkpoint.checkpointers import checkpoint_files
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.evaluation.recipe import LayerSkipEval
from layerskip_recipes.model.decoder import layerskip_decoder

pytestmark = pytest.mark.slow


def test_eval_measures_every_exit(tmp_path, checkpoint, capsys):
    """Loss, accuracy and agreement by plain PyTorch over the same samples; the picture is a PNG."""
    recipe, report = run_eval(eval_config(tmp_path, checkpoint, picture=str(tmp_path / "exits.png")))
    model = tune_config.instantiate(OmegaConf.create(MODEL))
    model.load_state_dict(recipe.model.state_dict())
    tokens = torch.tensor([sample["tokens"] for sample in recipe.batches.dataset])
    labels = tokens[:, 1:].flatten()
    with torch.no_grad():
        logits = {e: of_exit[:, :-1].flatten(0, 1) for e, of_exit in enumerate(exit_logits(model, tokens), start=1)}
    assert list(report["exits"]) == [1, 2, 3, 4]
    for e, quality in report["exits"].items():
        assert quality["loss"] == pytest.approx(F.cross_entropy(logits[e], labels).item(), abs=1e-4)
        agree = (logits[e].argmax(-1) == logits[4].argmax(-1)).float().mean().item()
        assert quality["agreement"] == pytest.approx(agree, abs=1e-3)
        assert quality["accuracy"] == pytest.approx((logits[e].argmax(-1) == labels).float().mean().item(), abs=1e-3)
    assert (tmp_path / "exits.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["batches"] == 2


def test_a_sample_matches_exactly_where_every_label_is_the_exits_choice(tmp_path, checkpoint):
    """A sample whose every label is the exit's choice is exact; a label that does not count cannot make it wrong."""
    recipe = ready(LayerSkipEval, eval_config(tmp_path, checkpoint))
    tokens = torch.stack([torch.tensor(sample["tokens"]) for sample in list(recipe.batches.dataset)[:4]])
    with torch.no_grad():
        chosen = recipe.model(tokens, exit_layer=2).argmax(-1)
    labels = torch.full_like(tokens, -100)
    labels[:3, 5:8] = chosen[:3, 4:7]
    labels[0, 6] = (labels[0, 6] + 1) % 100  # one wrong, two exact, and a sample without labels
    quality = exit_quality(recipe.model, [{"tokens": tokens, "labels": labels}], [2, 4], torch.device("cpu"))
    assert quality[2].exact_match == pytest.approx(2 / 3)


def test_exits_of_a_quantised_model_use_its_quantised_head(tmp_path, checkpoint):
    """Its head, here a quantised copy of the tied one, is called as it is."""
    quantizer = {"_component_": "torchao.quantization.Int8WeightOnlyConfig"}
    recipe, report = run_eval(eval_config(tmp_path, checkpoint, quantizer=quantizer))
    model = recipe.model
    tokens = torch.tensor([sample["tokens"] for sample in recipe.batches.dataset])
    assert type(model.output.weight) is not torch.nn.Parameter
    with torch.no_grad():
        hidden = model(tokens, exit_layer=2, unembed=False)
        logits = model.output(model.norm(hidden))[:, :-1].flatten(0, 1)
    assert report["exits"][2]["loss"] == pytest.approx(
        F.cross_entropy(logits, tokens[:, 1:].flatten()).item(), abs=1e-4
    )


def test_eval_compares_checkpoints(tmp_path, checkpoint, tokenizer_folder):
    other = make_checkpoint(tmp_path / "other", tokenizer_folder, seed=1)

    def evaluate(**changes):
        return run_eval(eval_config(tmp_path, **changes))[1]

    alone = {folder: evaluate(checkpoint=folder)["exits"] for folder in (checkpoint, other)}
    report = tmp_path / "report" / "exits.json"
    both = evaluate(checkpoint=checkpoint, compare={"other": {"checkpoint_dir": str(other)}}, report=str(report))
    assert both["exits"] == alone[checkpoint] != alone[other] == both["compare"]["other"]
    assert json.loads(report.read_text()) == json.loads(json.dumps(both))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("the second checkpoint is broken")])
def test_eval_loses_nothing_that_it_measured(tmp_path, checkpoint, monkeypatch, capsys, error):
    """The report says so; it goes beside a complete one of before, and so does the picture."""
    report, picture = tmp_path / "exits.json", tmp_path / "exits.png"
    compare = {"other": {"checkpoint_dir": str(checkpoint)}}
    files = {"report": str(report), "picture": str(picture)}
    recipe = ready(LayerSkipEval, eval_config(tmp_path, checkpoint, compare=compare, **files))
    exits_of = recipe._measure_exits

    def first_only(name):
        if name == "other":
            raise error
        return exits_of(name)

    monkeypatch.setattr(recipe, "_measure_exits", first_only)
    complete = '{"exits": {}}'
    for stem in ("exits", "exits_interrupted"):
        with nullcontext() if error is KeyboardInterrupt else pytest.raises(RuntimeError, match="is broken"):
            recipe.evaluate()
        found = json.loads(report.with_stem(stem).read_text())
        assert list(found["exits"]) == ["1", "2", "3", "4"] and found["compare"] == {} and found["interrupted"] is True
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
        assert found["picture"] == str(picture.with_stem(stem)) and picture.with_stem(stem).is_file()
        # Were that one complete:
        report.write_text(complete)
        picture.write_text(complete)
    assert report.read_text() == picture.read_text() == complete


def test_an_evaluation_that_measured_nothing_leaves_the_last_report(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "exits.json").write_text("yesterday's")
    recipe = ready(LayerSkipEval, eval_config(tmp_path, checkpoint, report=str(tmp_path / "exits.json")))
    monkeypatch.setattr(recipe, "_measure_exits", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe.evaluate()
    assert (tmp_path / "exits.json").read_text() == "yesterday's"


# ---- checkpoints to compare, and samples ----

NAMED = ["model-00001-of-00001.safetensors"]
COUNTED = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00001"}


@pytest.mark.parametrize(
    ("own", "others"),
    [(NAMED, COUNTED), (COUNTED, NAMED), (COUNTED, {"max_filename": "00001"})],
)
def test_the_files_of_checkpoints_have_either_form(own, others, tmp_path, tokenizer_folder):
    folders = [make_checkpoint(tmp_path / name, tokenizer_folder) for name in ("own", "other")]
    for folder in folders:
        (folder / "model.safetensors").rename(folder / NAMED[0])
    compare = {"before": {"checkpoint_dir": str(folders[1]), "checkpoint_files": others}}
    path = eval_config(tmp_path, folders[0], compare=compare)
    form = [f"checkpointer.checkpoint_files={own}".replace("'", '"')]
    checkpoints = LayerSkipEval(load_config(str(path), form)).checkpoints
    found = {name: cfg.checkpointer for name, cfg in checkpoints.items()}
    assert {name: section.get("checkpoint_dir") for name, section in found.items()} == {
        "own": str(folders[0]),
        "before": str(folders[1]),
    }
    assert all(checkpoint_files(section) == NAMED for section in found.values())
    assert found["before"].get("model_type") == "LLAMA3_2"


@pytest.mark.parametrize(("length", "drafts", "expected"), [(1, 3, None), (2, 3, 0.0), (5, 6, 3.0), (9, 3, 3.0)])
def test_an_accepted_length_counts_the_ends_of_answers(length, drafts, expected):
    """The first token of an answer comes from its prefill, and the last round of a short answer is short."""
    model = layerskip_decoder(llama3_2(**SIZE)).eval()
    labels = torch.full((2, 16), -100)
    labels[:, 5 : 5 + length] = 7
    batch = {"tokens": torch.ones(2, 16, dtype=torch.long), "labels": labels}
    quality = exit_quality(model, [batch], [2, 4], torch.device("cpu"), num_speculations=drafts)
    assert quality[4].accepted_length == expected and quality[4].agreement == 1


def test_samples_longer_than_the_model_are_cut(tmp_path, tokenizer_folder):
    dataset = text_data(tmp_path / "texts.json", ["if x: " * length for length in (5, 5, 500)])
    path = eval_config(tmp_path, make_checkpoint(tmp_path / "own", tokenizer_folder), dataset=dataset, batch_size=1)
    report = run_eval(path, "num_speculations=64")[1]
    assert report["batches"] == 3 and all(of["accepted_length"] is not None for of in report["exits"].values())
