"""load_model: five lines of Python that load, generate and print, from every kind of folder."""

import shutil

import pytest
import torch
from helpers.configs import finetune_config
from helpers.training import train
from safetensors.torch import load_file, save_file

from layerskip_recipes import generate, load_model
from layerskip_recipes.errors import ConfigError


def trained(folder, tokenizer, base, **changes):
    """The output folder of a training of the model."""
    model = {"_component_": "layerskip_recipes.hf_decoder", "path": str(base)}
    reader = {"_component_": "layerskip_recipes.hf_checkpointer", "path": str(base), "output_dir": "${output_dir}"}
    train(finetune_config(folder, tokenizer, model=model, checkpointer=reader, **changes))
    return folder / "out"


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory, tokenizer_folder):
    """The folder of a run that trained the exits 2 and 4."""
    return trained(tmp_path_factory.mktemp("run"), tokenizer_folder, checkpoint)


@pytest.fixture(scope="module")
def draft(checkpoint, tmp_path_factory, tokenizer_folder):
    """The folder of a run that trained a draft for the base."""
    section = {"kind": "adapter", "exit_layer": 1, "vocabulary": 60}
    changes = {"layer_dropout": None, "early_exit_loss": None, "draft": section}
    return trained(tmp_path_factory.mktemp("draft"), tokenizer_folder, checkpoint, **changes)


def generated(model, tokenizer, **settings):
    prompt = tokenizer.prompt("def read(path):")
    out = generate(model, prompt, 24, stop_tokens=tokenizer.stop_tokens, **settings)
    return tokenizer.decode(out.tokens[0]), out.stats


def test_five_lines(run):
    model, tokenizer = load_model(str(run))
    text, stats = generated(model, tokenizer, num_speculations=4)
    assert text == generated(model, tokenizer)[0]
    assert stats.drafted > 0 and not model.training


def test_which_exit_drafts(run, checkpoint):
    """The trained one that is nearest to a quarter of the depth; an exit that is given counts first."""
    model, tokenizer = load_model(str(run / "epoch_0"))
    assert model.drafting == {"exit_layer": 2}
    first, plain = generated(model, tokenizer, num_speculations=4, exit_layer=1), generated(model, tokenizer)
    assert first[0] == plain[0] and plain[1].drafted == 0
    untrained, tokenizer = load_model(str(checkpoint))
    with pytest.raises(ConfigError, match="num_speculations: 4 needs exit_layer too"):
        generated(untrained, tokenizer, num_speculations=4)


def test_a_trained_draft(checkpoint, draft):
    """Beside its model, or by its own folder, which names the model."""
    plain = generated(*load_model(str(checkpoint)))[0]
    for model, tokenizer in (load_model(str(checkpoint), draft=str(draft)), load_model(str(draft))):
        assert model.drafting["exit_layer"] == 1 and len(model.drafting["draft_vocabulary"]) <= 60
        text, stats = generated(model, tokenizer, num_speculations=3)
        assert text == plain and stats.drafted > 0
        assert not any("join" in name for name in model.state_dict())


def test_a_draft_of_another_model(run, draft):
    with pytest.raises(ConfigError, match=r"^draft: .*whose weights are not those of this model"):
        load_model(str(run), draft=str(draft))


def test_device_and_dtype(checkpoint):
    model, _ = load_model(str(checkpoint), device="cpu", dtype="bf16")
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    whole, _ = load_model(str(checkpoint), device="cpu")
    assert whole.tok_embeddings.weight.dtype == torch.float32
    for arguments, message in (({"dtype": "fp16"}, "dtype: 'fp16'"), ({"device": "gpu"}, "device: 'gpu'")):
        with pytest.raises(ConfigError, match=message):
            load_model(str(checkpoint), **arguments)


def test_changed_files_do_not_change_a_loaded_model(checkpoint, tmp_path):
    """Its weights are no views of the file."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    model, _ = load_model(str(folder), device="cpu")
    before = model.norm.scale.clone()
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors")
    assert torch.equal(model.norm.scale, before)
