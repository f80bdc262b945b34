"""load_model: a few lines of Python that load, generate and print, from every kind of folder."""

import logging
import shutil
from functools import partial

import pytest
import torch
from helpers.compiled import has_compiler
from helpers.configs import finetune_config, hf_sections
from helpers.tiny import make_tiny
from helpers.training import train
from safetensors.torch import load_file, save_file

from layerskip_recipes import generate, layerskip_decoder, load_model, stream
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation import api
from layerskip_recipes.generation.kernels import when_to_compile


def trained(folder, tokenizer, base, **changes):
    """The output folder of a training of the model."""
    train(finetune_config(folder, tokenizer, **hf_sections(base), **changes))
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
    out = generate(model, tokenizer.prompt("def read(path):"), 24, **settings)
    return tokenizer.decode(out.tokens[0]), out


def test_five_lines(run):
    """The text is that of plain decoding, at every temperature, at once or as a stream."""
    model, tokenizer = load_model(str(run))
    for temperature in (0.0, 0.9):
        settings = {"temperature": temperature, "seed": 3}
        plain, out = generated(model, tokenizer, draft=None, **settings)
        assert out.stats.drafted == 0 and out.speedup is None and not model.training
        assert temperature or not model.decoding_chooser.draft_models.built  # no draft is built that nobody wants
        text, out = generated(model, tokenizer, num_speculations=4, **settings)
        assert text == plain and out.stats.drafted > 0 and out.speedup > 0
        pieces = list(stream(model, tokenizer, "def read(path):", 24, num_speculations=4, **settings))
        assert plain.endswith("".join(pieces)) and len(pieces) > 2
        again = stream(model, tokenizer, "def read(path):", 24, num_speculations=4, **settings)
        assert "".join(pieces) == "".join(again)


def test_which_exit_drafts(run, checkpoint):
    """The one that the recipe chooses; an exit that is given counts first."""
    model, tokenizer = load_model(str(run / "epoch_0"))
    first = generated(model, tokenizer, num_speculations=4, exit_layer=1)
    assert first[0] == generated(model, tokenizer, draft=None)[0]
    untrained, tokenizer = load_model(str(checkpoint))
    assert generated(untrained, tokenizer)[1].stats.drafted == 0
    bare = layerskip_decoder(make_tiny())
    with pytest.raises(ConfigError, match="num_speculations: 4 needs exit_layer too"):
        generate(bare, [1, 2], 4, num_speculations=4)
    for wrong, message in (
        ({"num_speculations": 0}, "num_speculations: 0"),
        ({"exit": 3}, "exit"),
        ({"exit_layer": 2, "num_speculations": 2, "draft_vocabulary": 5}, "draft_vocabulary: "),
        ({"num_speculations": 3, "draft": None}, "num_speculations: is for drafts"),
    ):
        with pytest.raises((ConfigError, TypeError), match=message):
            generated(model, tokenizer, **wrong)


def test_compiling_is_announced_and_kept(run, monkeypatch, caplog):
    """Where ten calls gain more than it takes; the first one says so."""
    model, tokenizer = load_model(str(run))
    monkeypatch.setattr(when_to_compile, "COMPILE_S", {"cpu": 0.0})
    monkeypatch.setattr(when_to_compile, "LOAD_S", 0.0)
    compiled = []
    monkeypatch.setattr(api, "Generation", lambda *args, compile, **kwargs: compiled.append(compile) or stop())
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with pytest.raises(StopIteration):
                generated(model, tokenizer)
    assert compiled == [True, True] and caplog.text.count("Compiled: ") == 1


@has_compiler
@pytest.mark.slow
def test_a_later_prompt_reuses_what_it_shares_with_the_one_before(run):
    model, tokenizer = load_model(str(run))
    prompts = [tokenizer.prompt(text) for text in ("def read(path):", "def reader(path):")]
    for draft in ("auto", None):
        plain = [generate(model, prompt, 12, draft=None, compile=False).tokens for prompt in prompts]
        outs = [generate(model, prompt, 12, draft=draft, compile=True) for prompt in prompts]
        assert all(torch.equal(out.tokens, tokens) for out, tokens in zip(outs, plain, strict=True))
        assert 0 < outs[1].stats.reused_tokens < len(prompts[1])
    # Torch without compiled steps has a cache of its own.
    generate(model, prompts[0], 12, draft=None, compile=False)
    again = partial(generate, model, prompts[0], 12, draft=None, compile=True)
    assert again().stats.reused_tokens > 0
    # What torch has read is not reused, since it rounds differently; nor are numbers of another dtype.
    hook = model.layers[0].register_forward_hook(lambda *_: None)  # C++ does not run a layer with a hook
    assert again().stats.reused_tokens == 0
    hook.remove()
    assert again().stats.reused_tokens == 0
    assert again().stats.reused_tokens > 0
    model.to(torch.bfloat16)
    assert again().stats.reused_tokens == 0


def stop():
    raise StopIteration


def test_a_trained_draft(checkpoint, draft):
    """Beside its model, or by its own folder, which names the model. A named one drafts even if it is slow."""
    plain = generated(*load_model(str(checkpoint)))[0]
    for paths, given in (({"path": checkpoint, "draft": draft}, {}), ({"path": draft}, {"num_speculations": 3})):
        model, tokenizer = load_model(**{name: str(path) for name, path in paths.items()})
        text, out = generated(model, tokenizer, **given)
        assert text == plain and out.stats.drafted > 0
        assert not any("join" in name for name in model.state_dict())
        generated(model, tokenizer, num_speculations=2)  # with the same weights
        (built,) = model.decoding_chooser.draft_models.built.values()
        assert built.decoder.own_layers.start == 1 and len(built.head.vocabulary) <= 60


def test_device_and_dtype(checkpoint):
    model, _ = load_model(str(checkpoint), device="cpu", dtype="bf16")
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    whole, _ = load_model(str(checkpoint), device="cpu")
    assert whole.tok_embeddings.weight.dtype == torch.float32
    for arguments, message in (({"dtype": "fp16"}, "dtype: 'fp16'"), ({"device": "gpu"}, "device: 'gpu'")):
        with pytest.raises(ConfigError, match=message):
            load_model(str(checkpoint), **arguments)


def test_changed_files_do_not_change_a_loaded_model(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    model, _ = load_model(str(folder), device="cpu")
    before = model.norm.scale.clone()
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors")
    assert torch.equal(model.norm.scale, before)
