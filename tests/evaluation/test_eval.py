"""The config of `layerskip_eval`, its section `compare`, and its memory."""

import pytest
import torch
from helpers.configs import SIZE, eval_config, make_checkpoint
from helpers.recipes import run_eval
from helpers.training import few_texts, text_data  # noqa: F401
from torchtune.models.llama3_2 import llama3_2

from layerskip_recipes.checkpoint.checkpointers import checkpoint_files
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.evaluation.recipe import LayerSkipEval
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.exit_quality import exit_quality

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
