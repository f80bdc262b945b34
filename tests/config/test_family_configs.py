"""Every config of ours validates, its model builds, its header starts it, its exits make sense; and torchtune's own
full and LoRA configs train with LayerSkip. Nothing is downloaded, and no weight takes memory."""

import json
import os
import re
import shlex
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configs import HF_CONFIG
from omegaconf import DictConfig, OmegaConf
from torchtune._recipe_registry import get_all_recipes

from layerskip_recipes.cli.configs import validate
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import our_configs, torchtune_configs
from layerskip_recipes.model.layer_dropout import dropout_rates
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.early_exit import enabled_exits, exit_weights

# The paper's table: p_max, S(t), e_scale, curriculum, R, lr, batch per device, steps; None where it gives no value.
PAPER = {
    "llama2_7B_continual": (0.1, "constant", 0.2, "rotational", 8, 3e-5, 4, 50_000),
    "llama2_13B_continual": (0.1, "constant", 0.1, "rotational", 39, 2e-5, 4, 50_000),
    "llama3_8B_continual": (0.1, "constant", 0.1, "rotational", 8, None, None, None),
    "llama3_2_1B_continual": (0.1, "constant", 0.1, "rotational", 8, None, None, None),
    "llama2_1_5B_scratch": (0.1, "exp", 0.2, "rotational", 23, 8e-4, 4, 50_000),
    "llama2_7B_scratch": (0.2, "exp", 0.2, "rotational", 31, 8e-4, 4, 50_000),
    "llama_7B_code": (0.1, "constant", 1.0, "rotational", 16, 1e-4, 4, 10_000),
    "topv2_1_5B": (0.2, "constant", 1.0, "gradual", None, 1e-4, 32, 5_800),
}


def torchtunes() -> list[str]:
    """A full and a LoRA config of torchtune for each family of text models, and for one device and several."""
    kinds = re.compile("(full|lora)_finetune_(single_device|distributed)")
    known = {c.name for recipe in get_all_recipes() if kinds.fullmatch(recipe.name) for c in recipe.configs}
    names = sorted(name for name in known & set(torchtune_configs()) if "vision" not in name)
    return [*{re.sub(r"/[\w.]+?_(full|q?lora|q?dora)", r"/\1", name): name for name in names}.values()]


@cache
def header(name: str) -> str:
    """The comment at the top of a config, lines that a backslash continues joined."""
    lines = re.match(r"(?:#.*\n)*", our_configs()[name].read_text())[0]
    return re.sub(r"\\\n#\s*", "", lines)


@cache
def stand_in() -> list[str]:
    """A model of 48 layers for configs that read a model's folder."""
    folder = tempfile.mkdtemp(dir=os.environ["LAYERSKIP_TEST_RUN"])  # conftest.py deletes it
    Path(folder, "config.json").write_text(json.dumps(HF_CONFIG | {"num_hidden_layers": 48}))
    return [f"model_dir={folder}"]


@cache
def merged(name: str) -> DictConfig:
    config = load_config(name)
    data = ["data_dir=my_data"] if "data_dir" in [*config] else []
    return load_config(name, [*stand_in(), *data]) if "model_dir" in [*config] else config


@cache
def resolved(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(merged(name), resolve=True)


@pytest.fixture(scope="module", autouse=True)
def no_initialisation():
    """It takes half of the time, and no weight here has memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: None)
        patch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, **options: tensor)
        yield


# Found by their headers, as merging all configs takes seconds; a test below compares the headers with the recipes.
FINETUNE = [name for name in our_configs() if re.search("^#   tune run .*layerskip_finetune", header(name), flags=re.M)]


@pytest.mark.slow
@pytest.mark.parametrize("name", our_configs())
def test_a_config_validates_and_its_header_starts_its_recipe(name):
    recipe = validate(merged(name))
    commands = re.findall(r"^#   tune run (.*)$", header(name), flags=re.M)
    assert commands
    for command in commands:
        words = shlex.split(command)
        place = words.index("--config")
        assert words[place + 1] == name
        assert words[place - 1].replace("serve", "generate") == recipe  # a server takes generation configs
        overrides = words[place + 2 :]
        if overrides:
            reads_folder = "model_dir" in [*merged(name)]
            assert validate(load_config(name, [*overrides, *(stand_in() if reads_folder else [])])) == recipe


@pytest.mark.parametrize("name", [name for name in our_configs() if "tune download" in header(name)])
def test_the_download_in_a_header_goes_where_the_config_looks(name):
    """`tune download` writes to --output-dir, else to a folder in /tmp with the repository's name."""
    words = shlex.split(re.search(r"^#   tune download (.*)$", header(name), flags=re.M)[1])
    folder = words[words.index("--output-dir") + 1] if "--output-dir" in words else f"/tmp/{Path(words[0]).name}"
    own = load_config(name)
    if "model_dir" in own:
        assert own.model_dir == folder
        return
    overrides = re.findall(r"\S+=FOLDER\S*", header(name))  # several machines: a folder that all of them see
    config = OmegaConf.to_container(load_config(name, overrides), resolve=True) if overrides else resolved(name)
    read = [config["checkpointer"].get("checkpoint_dir"), *config["tokenizer"].values()]
    paths = [path for path in read if isinstance(path, str) and "/" in path]
    assert paths and all(path.removeprefix(folder)[:1] in ("", "/") for path in paths)


def test_each_run_has_a_folder_of_its_own_and_needs_no_bitsandbytes():
    in_its_place = ("qa/draft", "qa/lora")  # of qa/finetune
    folders = [resolved(name)["output_dir"] for name in FINETUNE if name not in in_its_place]
    assert len(set(folders)) == len(folders)
    assert [name for name in FINETUNE if merged(name).optimizer._component_.startswith("bitsandbytes")] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", torchtunes())
def test_torchtunes_training_configs_get_layerskips_sections(name, caplog):
    """By the path that `tune run` passes. The more exits a step has, the more it costs."""
    file = torchtune_configs()[name]
    source = load_config(str(file))
    cfg, theirs = FinetuneConfig.load(source), OmegaConf.to_container(OmegaConf.load(file))
    dropout, loss, layers = cfg.layer_dropout, cfg.early_exit_loss, cfg.num_layers
    assert (dropout.prob, loss.scale, loss.curriculum, cfg.seed) == (0.1, 0.1, "rotational", 0)
    turns = [enabled_exits("rotational", step, 9, layers, interval=loss.interval) for step in range(loss.interval)]
    assert all(2 <= sum(on) <= 5 for on in turns)
    got = OmegaConf.to_container(source)
    replaced = {key for key in theirs if got[key] != theirs[key]} - {"seed"}
    needs = {"optimizer"} if "full" in name else set()  # bitsandbytes, and AdamW that rounds small steps in bf16
    assert replaced == needs | ({"checkpointer"} if name.startswith("llama3/8B") else set())
    assert "stochastic" in str(got["optimizer"]) or not needs
    (line,) = (message for message in caplog.messages if message.startswith("Added to torchtune's"))
    assert all(f"{key}={{" in line for key in {"layer_dropout", "early_exit_loss", *replaced})


def test_a_users_config_keeps_its_own_values(tmp_path):
    """Also one that extends torchtune's. An override of a section that was added changes it, or replaces it."""
    path = tmp_path / "my.yaml"
    path.write_text("extends: llama3_2/1B_full\n")
    assert "layer_dropout" not in load_config(str(path)) and "Stochastic" not in str(load_config(str(path)))
    changed = load_config("llama3_2/1B_full", ["layer_dropout.prob=0.2", "early_exit_loss=null"])
    assert changed.layer_dropout == {"prob": 0.2, "layers_scale": "exp"} and changed.early_exit_loss is None
    assert "layer_dropout" not in load_config("llama3_2/1B_full", ["draft.exit_layer=2"])
    assert "optimizer" not in load_config("generation")


@pytest.mark.parametrize("name", PAPER)
def test_paper_configs_have_the_values_of_the_papers_table(name):
    prob, schedule, scale, curriculum, interval, lr, batch_size, steps = PAPER[name]
    config = merged(f"paper/{name}")
    dropout, loss = config.layer_dropout, config.early_exit_loss
    assert (dropout.prob, dropout.layers_scale, dropout.schedule) == (prob, "exp", schedule)
    assert dropout.inverted is False and loss.label_rows_only is False
    assert (loss.scale, loss.curriculum, loss.get("interval")) == (scale, curriculum, interval)
    for given, expected in (
        (config.optimizer.lr, lr),
        (config.batch_size, batch_size),
        (config.epochs * config.max_steps_per_epoch, steps),
    ):
        assert expected is None or given == expected
    assert resolved(f"paper/{name}")["tokenizer"]["max_seq_len"] == 4096


def test_every_paper_config_is_in_the_table():
    assert {f"paper/{name}" for name in PAPER} == {name for name in our_configs() if name.startswith("paper/")}


@pytest.mark.parametrize(("name", "billions"), [("llama2_1_5B_scratch", 1.5), ("llama2_7B_scratch", 6.74)])
def test_models_from_scratch_have_the_papers_sizes(name, billions):
    model = FinetuneConfig.load(merged(f"paper/{name}")).meta_model
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weights / 1e9 == pytest.approx(billions, rel=0.02)


def test_configs_of_related_methods_have_their_weights_and_rates():
    """LITE weighs its exits alike; LayerDrop drops all layers alike; PLD's rate grows linearly to a half, and that of
    Don't Drop Dropout to 0.6, both with divided outputs."""
    lite = merged("related/lite_llama2_7B").early_exit_loss
    on = enabled_exits(lite.curriculum, 0, 1, 32, exits=lite.exits)
    assert [layer + 1 for layer in range(32) if on[layer]] == [8, 12, 16, 20, 24, 28, 32]
    weights = exit_weights(32, on, lite.scale, lite.scale_fn)
    assert weights[on].tolist() == pytest.approx([1 / 7] * 7)
    assert merged("related/lite_llama2_7B").get("layer_dropout") is None
    layerdrop = merged("related/layerdrop_llama2_7B").layer_dropout
    assert set(dropout_rates(32, layerdrop.prob, layerdrop.layers_scale)) == {0.2} and not layerdrop.inverted
    pld = merged("related/pld_scratch").layer_dropout
    rates = dropout_rates(24, pld.prob, pld.layers_scale)
    assert rates == pytest.approx([0.5 * layer / 23 for layer in range(24)])
    assert pld.schedule == "progressive" and pld.inverted
    dont_drop = merged("related/dont_drop_dropout")
    settings = {"prob": 0.6, "layers_scale": "linear", "schedule": "linear_decay", "inverted": True}
    assert dont_drop.layer_dropout == settings and dont_drop.early_exit_loss is None
