"""From a config's name to a merged config: lookup, `extends`, overrides, and all configs we know."""

import importlib.util
import re
from pathlib import Path

import pytest
from helpers.configs import eval_config, finetune_config, generate_config, make_checkpoint, write_yaml
from helpers.training import few_texts  # noqa: F401
from omegaconf import OmegaConf
from torchtune._recipe_registry import get_all_recipes

from layerskip_recipes.cli.configs import validate
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import find_config, our_configs, torchtune_configs
from layerskip_recipes.training.recipe import LayerSkipFinetune


@pytest.fixture
def base(tmp_path, tokenizer_folder) -> Path:
    """A finetune config to extend or override, with a component section of several arguments."""
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
    return finetune_config(tmp_path, tokenizer_folder, optimizer=optimizer)


def extend(base: Path, name: str = "mine.yaml", **keys) -> Path:
    """A config beside `base` that extends it by its file name."""
    return write_yaml(base.parent / name, {"extends": base.name, **keys})


# ------------------------------------------------------------------------------------------------------------ names


def test_ours_extends_torchtunes():
    """A short name of ours, which itself extends a name of torchtune's: both ends are in the result."""
    config = load_config("llama3_2/1B_full_single_device_layerskip")
    assert config.layer_dropout.prob == 0.1
    assert config.model._component_ == "torchtune.models.llama3_2.llama3_2_1b"
    assert "extends" not in config


@pytest.mark.parametrize("way", ["absolute", "relative", "dotted", "home"])
def test_a_path_is_found_from_any_folder(way, base, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    name = {
        "absolute": str(base),
        "relative": "../finetune.yaml",
        "dotted": "./../finetune.yaml",
        "home": "~/finetune.yaml",
    }[way]
    assert load_config(name).max_steps_per_epoch == 2


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("quickstart/finetun", "quickstart/finetune"),
        ("quickstart/finetune.yaml", "quickstart/finetune"),
        ("llama3_2/1B_full_single_devce", "llama3_2/1B_full_single_device"),
        ("1B_full_single_device_layerskip", "llama3_2/1B_full_single_device_layerskip"),
        ("Quickstart/Generate", "quickstart/generate"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(ValueError, match=rf"^config: '{re.escape(name)}' .*Nearest: .*{re.escape(near)}[,.]"):
        load_config(name)


@pytest.mark.parametrize("name", ["/nonexistent/mine.yaml", "mine.yaml", "", ".", "zzzzzzzz", "x" * 5000])
def test_a_name_like_nothing_else(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^config: .*layerskip ls"):
        load_config(name)


# ---------------------------------------------------------------------------------------------------------- extends


def test_extends_is_relative_to_the_extending_file(base, tmp_path, monkeypatch):
    """Also when the current folder has a file of that name."""
    (tmp_path / "elsewhere").mkdir()
    write_yaml(tmp_path / "elsewhere" / base.name, {"epochs": 99})
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(str(extend(base))).epochs == 1


def test_later_keys_win_along_a_chain_and_the_command_line_over_all(base):
    middle = extend(base, "middle.yaml", batch_size=3, epochs=3, layer_dropout={"prob": 0.3})
    last = extend(middle, "last.yaml", epochs=4, layer_dropout={"layers_scale": "linear"})
    config = load_config(str(last), ["seed=5", "layer_dropout.prob=0.5"])
    assert (config.max_steps_per_epoch, config.batch_size, config.epochs, config.seed) == (2, 3, 4, 5)
    assert config.layer_dropout == {"prob": 0.5, "layers_scale": "linear"}


def test_interpolations_follow_what_is_merged_later(base):
    """The base's log folder hangs on its output_dir; the extending file and the command line move it."""
    path = str(extend(base, output_dir="/moved", mine=3, batch_size="${mine}"))
    assert load_config(path).metric_logger.log_dir == "/moved/logs"
    assert load_config(path).batch_size == 3
    assert load_config(path, ["output_dir=/again"]).metric_logger.log_dir == "/again/logs"
    assert load_config(path, ["metric_logger.log_dir=/fixed"]).metric_logger.log_dir == "/fixed"
    assert load_config(path, ["metric_logger.log_dir=/fixed"]).checkpointer.output_dir == "/moved"
    assert load_config(path, ["epochs=${batch_size}"]).epochs == 3
    LayerSkipFinetune(load_config(path))  # a variable of the user's own is no unknown key


def test_null_switches_a_section_off(base):
    """Torchtune's own command line cannot do that to a section with `_component_`."""
    path = extend(base, layer_dropout=None, metric_logger=None)
    config = load_config(str(path), ["optimizer=null", "early_exit_loss=null"])
    assert [config[k] for k in ("layer_dropout", "metric_logger", "optimizer", "early_exit_loss")] == [None] * 4


def test_a_list_of_datasets_replaces_a_single_one(base):
    one = OmegaConf.load(base).dataset
    config = load_config(str(extend(base, dataset=[one, one])))
    assert len(config.dataset) == 2
    assert validate(config) == "layerskip_finetune"


@pytest.mark.parametrize("numbered_first", [True, False])
def test_numbered_checkpoint_files_and_a_list_replace_each_other(numbered_first, base):
    numbered = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00003"}
    first, second = (numbered, ["a"]) if numbered_first else (["a"], numbered)
    middle = extend(base, "middle.yaml", checkpointer={"checkpoint_files": first})
    config = load_config(str(extend(middle, "last.yaml", checkpointer={"checkpoint_files": second})))
    assert config.checkpointer.checkpoint_files == second


def test_a_cycle_is_an_error_that_shows_it(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        write_yaml(tmp_path / f"{name}.yaml", {"extends": f"{base}.yaml"})
    with pytest.raises(ValueError, match=r"^extends: .*a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        load_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("quickstart/finetun", "'quickstart/finetun' .*Nearest: quickstart/finetune"),
        ("nothere.yaml", "'nothere.yaml'"),
        ("", "''"),
        (3, "3"),
        (["quickstart/finetune", "quickstart/finetun"], "'quickstart/finetun'"),
        ([3], "3"),
        ({"a": "b"}, "{'a': 'b'}"),
    ],
)
def test_extends_what_does_not_exist(base, message, tmp_path):
    path = write_yaml(tmp_path / "mine.yaml", {"extends": base})
    with pytest.raises(ValueError, match=f"^(config|extends): {message}"):
        load_config(str(path))


@pytest.mark.parametrize(
    "text",
    ["a: [1\n", "a: 1\n\tb: 2\n", "a: 1\na: 2\n", "- a\n- b\n", "3\n", b"\xff\xfe\x00", "a: ${\n", "a: 1\n---\nb: 1\n"],
)
def test_a_file_that_is_no_mapping_is_named(text, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"^config: .*broken\.yaml"):
        load_config(str(path))


def test_a_file_from_another_editor(base):
    """A byte-order mark and Windows line ends."""
    path = base.parent / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfextends: finetune.yaml\r\nbatch_size: 7\r\n")
    assert load_config(str(path)).batch_size == 7


def test_a_slice_in_a_file_is_no_time_of_day(base):
    """YAML 1.1 reads 1:5 as 65, minutes and seconds; on a model of 80 layers 1:9 would silently be layer 69."""
    path = base.parent / "slice.yaml"
    path.write_text("extends: finetune.yaml\nearly_exit_loss:\n  layers: 1:3\n")
    assert load_config(str(path)).early_exit_loss.layers == "1:3"


# -------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.lr", "2e-5", 2e-5),
        ("optimizer.lr", "1E-4", 1e-4),
        ("optimizer.betas", "[0.8, 0.9]", [0.8, 0.9]),
        ("epochs", "3", 3),
        ("shuffle", "false", False),
        ("clip_grad_norm", "null", None),
        ("clip_grad_norm", "None", None),
        ("new.nested.key", "1", 1),
        ("layer_dropout", "{prob: 0.3, layers: '0::2'}", {"prob": 0.3, "layers": "0::2"}),
        ("output_dir", "a=b=c", "a=b=c"),
        ("output_dir", "${seed}/x", "0/x"),
        # Layers as DESIGN and upstream write them.
        ("early_exit_loss.layers", ":", ":"),
        ("early_exit_loss.layers", "0::4", "0::4"),
        ("early_exit_loss.layers", "1:5", "1:5"),
        ("early_exit_loss.layers", "8,12,16", "8,12,16"),
        # A prompt is text, whatever YAML would make of it.
        ("prompt", "def fibonacci(n):", "def fibonacci(n):"),
        ("prompt", "Question: who are you?", "Question: who are you?"),
        ("prompt.user", "What is 1 # 2?", "What is 1 # 2?"),
        ("prompt", "# a comment", "# a comment"),
        ("prompt", '"quoted" text', '"quoted" text'),
        ("prompt", "- item", "- item"),
        ("prompt", "@decorator", "@decorator"),
        ("prompt", "{unfinished", "{unfinished"),
        ("prompt", "12:30", "12:30"),
        ("prompt", "[a, b]", ["a", "b"]),
    ],
)
def test_the_value_of_an_override(key, text, value, base):
    got = OmegaConf.select(load_config(str(base), [f"{key}={text}"]), key)
    got = OmegaConf.to_container(got) if OmegaConf.is_config(got) else got
    assert (got, type(got)) == (value, type(value))


def test_a_file_number_stays_text(base):
    files = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00001"}
    path = extend(base, checkpointer={"checkpoint_files": files})
    config = load_config(str(path), ["checkpointer.checkpoint_files.max_filename=00003"])
    assert config.checkpointer.checkpoint_files.max_filename == "00003"


def test_a_tilde_removes_a_key(base):
    config = load_config(str(base), ["~layer_dropout", "~optimizer.betas"])
    assert "layer_dropout" not in config and "betas" not in config.optimizer and "lr" in config.optimizer


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [(["seed=1", "~seed"], None), (["~seed", "seed=1"], 1), (["new.key=1", "~new.key"], None)],
)
def test_overrides_count_in_their_order(overrides, expected, base):
    key = overrides[0].strip("~").split("=")[0]
    assert OmegaConf.select(load_config(str(base), overrides), key) == expected


def test_the_home_folder_in_a_path(base, monkeypatch):
    """In a file, where no shell expands it; what is no path stays as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    old = {"checkpoint_dir": "~/old", "checkpoint_files": ["~/a"]}
    path = extend(base, output_dir="~/runs", compare={"old": old})
    config = load_config(
        str(path),
        [
            "picture=~/x.png",
            "self_speculation.draft=~/run/epoch_0",
            "prompt=~/ls",
            "log_dir=${output_dir}/logs",
            "report=~me/x",
        ],
    )
    assert (config.output_dir, config.log_dir) == ("/home/me/runs", "/home/me/runs/logs")
    assert config.compare.old == {"checkpoint_dir": "/home/me/old", "checkpoint_files": ["/home/me/a"]}
    assert (config.picture, config.prompt, config.report) == ("/home/me/x.png", "~/ls", "~me/x")
    assert config.self_speculation.draft == "/home/me/run/epoch_0"


@pytest.mark.parametrize("override", ["batch_size", "=3", "~nothere", "~optimizer.nothere", "~", ""])
def test_an_override_of_another_form(override, base):
    with pytest.raises(ValueError, match=f"^override: '?{override}"):
        load_config(str(base), [override])


SGD = "torch.optim.SGD"  # takes lr and weight_decay as AdamW does, but no betas


@pytest.mark.parametrize("key", ["optimizer", "optimizer._component_"])
def test_another_component_on_the_command_line(key, base):
    """It keeps the arguments that it has, and leaves those behind that it lacks."""
    config = load_config(str(base), [f"{key}={SGD}", "optimizer.momentum=0.9"])
    assert config.optimizer == {"_component_": SGD, "lr": 1e-3, "weight_decay": 0.1, "momentum": 0.9}


def test_a_component_that_takes_any_argument_inherits_those_that_it_names():
    """The others would go to `datasets.load_dataset`, which says nothing that helps."""
    component = "torchtune.datasets.text_completion_dataset"
    config = load_config("quickstart/finetune", [f"dataset={{_component_: {component}, source: json, data_files: a}}"])
    assert load_config("quickstart/finetune").dataset.keys() >= {"seq_len", "split"}
    assert config.dataset == {"_component_": component, "source": "json", "data_files": "a", "split": "train"}


def test_another_component_in_the_extending_file(base):
    config = load_config(str(extend(base, optimizer={"_component_": SGD, "lr": 1.0})))
    assert config.optimizer == {"_component_": SGD, "lr": 1.0, "weight_decay": 0.1}


@pytest.mark.parametrize("first", [True, False])
def test_an_argument_given_beside_the_component_is_not_lost(first, base):
    """Only the base's arguments stay behind: what the user typed along is refused if the component lacks it."""
    overrides = ["optimizer.betas=[0.8,0.9]", f"optimizer={SGD}"]
    with pytest.raises(ValueError, match=r"^optimizer\.betas"):
        LayerSkipFinetune(load_config(str(base), overrides if first else overrides[::-1]))


def test_scratch_over_a_pretrained_config_is_from_scratch(tmp_path, tokenizer_folder):
    """The checkpoint folder of the base must stay behind, or the run would start from its weights."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", tokenizer_folder)
    scratch = OmegaConf.load(finetune_config(tmp_path, tokenizer_folder)).checkpointer
    base = generate_config(tmp_path, checkpoint)
    config = load_config(str(extend(base, checkpointer=scratch)))
    assert not config.checkpointer.get("checkpoint_files")
    assert not config.checkpointer.get("checkpoint_dir")


# ------------------------------------------------------------------------------------------- all configs that exist


def of_recipes(*recipes: str) -> list[str]:
    names = {config.name for recipe in get_all_recipes() if recipe.name in recipes for config in recipe.configs}
    return sorted(names & set(torchtune_configs()))


def refusal(name: str, *overrides: str) -> str | None:
    """The key that a torchtune config is refused for, which must be one of its keys; None if it validates."""
    config = load_config(name, overrides)
    try:
        validate(config)
    except ValueError as e:
        key = str(e).partition(":")[0]
        assert OmegaConf.select(config, key) is not None, f"names no key of the config: {e}"
        return key
    return None


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def finetune_configs() -> list[str]:
    """torchtune's, without those that one of ours extends and test_family_configs.py validates. Ours have no optimizer
    of bitsandbytes, so theirs that have one are here."""
    kinds = ("full_finetune_single_device", "full_finetune_distributed")
    names = of_recipes(*kinds, "lora_finetune_single_device", "lora_finetune_distributed")
    ours = our_configs()
    return [n for n in names if f"{n}_layerskip" not in ours or "bitsandbytes" in find_config(n).read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("name", finetune_configs())
def test_torchtunes_finetune_configs_validate(name):
    """With nothing of theirs changed; without their weights, their GPUs, or bitsandbytes."""
    key = refusal(name, "layer_dropout.prob=0.1", "early_exit_loss.scale=0.2")
    if "vision" in name:
        assert key.startswith("model" if has("torchvision") else ("tokenizer._component_", "model._component_"))
    else:
        needs = "bitsandbytes" in load_config(name).optimizer._component_
        assert key == ("optimizer._component_" if needs and not has("bitsandbytes") else None)


@pytest.mark.parametrize("name", of_recipes("generate"))
def test_torchtunes_generation_configs_validate(name):
    assert refusal(name, "self_speculation.exit_layer=8", "self_speculation.num_speculations=6") is None


def test_validate_knows_which_recipe_a_config_is_for(tmp_path, tokenizer_folder):
    """From its keys: the checkpoint does not exist, which only the recipe itself minds."""
    forms = {
        "layerskip_finetune": finetune_config(tmp_path, tokenizer_folder),
        "layerskip_generate": generate_config(tmp_path, tmp_path / "nowhere"),
        "layerskip_eval": eval_config(tmp_path, tmp_path / "nowhere"),
    }
    for recipe, path in forms.items():
        assert validate(load_config(str(path))) == recipe
