"""Training and generation from a Hugging Face folder by hf_decoder and hf_checkpointer, adapters and mistakes too."""

import shutil
from collections import namedtuple

import pytest
import torch
from helpers.adapters import tokens_of
from helpers.configs import MODEL, finetune_config, generate_config
from helpers.hf_folders import make_hf_folder
from helpers.training import few_texts, losses, train  # noqa: F401
from safetensors.torch import load_file

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.recipe import LayerSkipFinetune

LORA = {"rank": 3, "alpha": 6.0, "attn_modules": ["q_proj", "output_proj"]}


def sections(folder, **model):
    """The sections model and checkpointer of a Hugging Face folder."""
    checkpointer = {"_component_": "layerskip_recipes.hf_checkpointer", "path": str(folder)}
    return {
        "model": {"_component_": "layerskip_recipes.hf_decoder", "path": str(folder), **model},
        "checkpointer": {**checkpointer, "output_dir": "${output_dir}"},
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder):
    """A Qwen3 with the tests' tokenizer."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("base") / "Qwen3"
    make_hf_folder("qwen3", folder, vocab_size=300)
    for file in tokenizer_folder.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("lora", [{}, {"lora": LORA}], ids=["full", "LoRA"])
def test_a_run_resumes_and_its_checkpoint_opens_in_transformers(base, lora, tmp_path, tokenizer_folder):
    from transformers import AutoModelForCausalLM

    path = finetune_config(tmp_path, tokenizer_folder, **sections(base, **lora), epochs=2)
    recipe = train(path)
    shutil.copytree(tmp_path / "out" / "epoch_0", tmp_path / "again" / "epoch_0")
    train(path, f"output_dir={tmp_path}/again", "resume_from_checkpoint=true")
    whole, later = losses(tmp_path / "out"), losses(tmp_path / "again")
    assert sorted(later) == [3, 4] and all(later[step] == whole[step] for step in later)

    written = tmp_path / "out" / "epoch_1"
    weights = load_file(written / "model.safetensors")
    again = load_file(tmp_path / "again" / "epoch_1" / "model.safetensors")
    start = load_file(base / "model.safetensors")
    assert weights.keys() == start.keys() and any(not torch.equal(weights[name], start[name]) for name in weights)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    tokens = 3 + torch.arange(40).view(2, 20) * 7 % 297
    theirs = AutoModelForCausalLM.from_pretrained(written).eval()
    recipe.model.eval()
    with torch.no_grad():
        expected = recipe.model(tokens)
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_generation_adds_adapters_to_their_base(base, tmp_path, tokenizer_folder):
    """The tokens are those of the merged checkpoint."""
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 0.05}  # so large that tokens change
    train(finetune_config(tmp_path, tokenizer_folder, **sections(base, lora=LORA), optimizer=optimizer))
    trained = tmp_path / "out" / "epoch_0"
    adapted = sections(base, lora=LORA)
    adapted["checkpointer"]["adapter_checkpoint"] = str(trained)
    runs = {"base": sections(base), "merged": sections(trained), "adapters": adapted}
    tokens = {
        name: tokens_of(generate_config(tmp_path / name, base, max_new_tokens=24, output_dir="unused", **changes))
        for name, changes in runs.items()
    }
    assert tokens["adapters"] == tokens["merged"] != tokens["base"]


def test_room_on_the_disk_is_asked_for_what_is_written(base, tmp_path, tokenizer_folder):
    """In fp32 the adapters, where they alone are."""
    path = finetune_config(tmp_path, tokenizer_folder, **sections(base, lora=LORA))
    whole, adapters = (
        FinetuneConfig.load(load_config(str(path), [f"save_adapter_weights_only={value}"]))
        for value in ("false", "true")
    )
    count = sum(value.numel() for name, value in whole.meta_model.named_parameters() if "lora" in name)
    assert adapters.checkpoint_bytes == 4 * count < whole.checkpoint_bytes


def _disk_is_full(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2**30, 2**30, 1000))


TORCHTUNES = {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_files": ["model.safetensors"],
              "model_type": "LLAMA3_2", "output_dir": "${output_dir}"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "prepare", "message"),
    [
        ({"model": MODEL}, None, "checkpointer._component_: layerskip_recipes.hf_checkpointer does not fit"),
        ({"checkpointer": TORCHTUNES}, None, "FullModelHFCheckpointer does not fit .*Allowed: layerskip_recipes.hf_c"),
        ({}, _disk_is_full, r"output_dir: .* has 0\.0 GiB left, and a checkpoint's weights take 0\.0 GiB"),
        ({"output_dir": "BASE/out"}, None, "lies in checkpointer.checkpoint_dir"),
        ({"model": {"path": "BASE", "lora": {"rank": 0}}}, None, "model.lora.rank: 0 is not allowed. Allowed: an int"),
        ({"model": {"path": "BASE", "lora": {"rang": 8}}}, None, "model.lora.rang: unknown key. Nearest: rank"),
        ({"model": {"path": "BASE", "max_seq_len": 1000}}, None, r"model.max_seq_len: 1000 .*Allowed: 1\.\.128"),
        ({"model": {"path": "nowhere"}}, None, "path: 'nowhere' is no folder. Allowed: a folder with config.json"),
    ],
)
def test_a_mistake_is_said_before_the_run(changes, prepare, message, base, tmp_path, tokenizer_folder, monkeypatch):
    config = sections(base) | changes
    if "_component_" not in config["model"]:
        config["model"] = {"_component_": "layerskip_recipes.hf_decoder", **config["model"]}
    config = {key: _with_base(value, base) for key, value in config.items()}
    if "FullModel" in config["checkpointer"]["_component_"]:
        config["checkpointer"]["checkpoint_dir"] = str(base)
    path = finetune_config(tmp_path, tokenizer_folder, **config)
    if prepare:
        prepare(monkeypatch)
    with pytest.raises(ConfigError, match=message) as e:
        LayerSkipFinetune(load_config(str(path), [])).setup()
    assert "\n" not in str(e.value) and not (base / "out").exists()


def _with_base(value, base):
    if isinstance(value, dict):
        return {key: _with_base(part, base) for key, part in value.items()}
    return value.replace("BASE", str(base)) if isinstance(value, str) else value
