"""From a config's name to a merged config: lookup, `extends`, overrides, and torchtune's own configs."""

import json
from pathlib import Path

import pytest
from helpers.configs import finetune_config, write_yaml
from omegaconf import OmegaConf
from torchtune._recipe_registry import get_all_recipes

from layerskip_recipes.cli.configs import validate
from layerskip_recipes.config import auto, recipe_config
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.recipe import LayerSkipFinetune


@pytest.fixture
def base(tmp_path, tokenizer_folder) -> Path:
    """A finetune config to extend or override, with a component section of several arguments."""
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
    return finetune_config(tmp_path, tokenizer_folder, optimizer=optimizer)


def extend(base: Path, name: str = "mine.yaml", **keys) -> str:
    """A config beside `base` that extends it by its file name."""
    return str(write_yaml(base.parent / name, {"extends": base.name, **keys}))


def test_an_nvidia_gpu_that_torch_cannot_use_is_told(tmp_path, base, monkeypatch):
    """Otherwise a driver that is too old means days of training on the CPU, and device=cuda would be refused without
    the reason."""
    told = []
    for module in (auto, recipe_config):
        monkeypatch.setattr(module, "devices_here", lambda: ["cpu"])
    monkeypatch.setattr(auto, "log_once", lambda log, message, level: told.append(message))
    monkeypatch.setattr(auto, "NVIDIA", tmp_path / "nvidia0")
    assert auto.best_device() == "cpu" and not told
    cfg = FinetuneConfig.load(load_config(str(base), ["device=cuda"]))
    with pytest.raises(ConfigError, match=r"^device: 'cuda' .*Allowed here: cpu"):
        cfg.find_device()
    (tmp_path / "nvidia0").touch()
    assert auto.best_device() == "cpu" and "NVIDIA" in told[0] and "CUDA" in told[0]
    with pytest.raises(ConfigError, match=r"^device: 'cuda' .* NVIDIA .* driver .*Allowed here: cpu"):
        cfg.find_device()


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["../finetune.yaml", "~/finetune.yaml"])
def test_a_path_is_found_from_any_folder(name, base, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(name).max_steps_per_epoch == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickstart/finetun", "'quickstart/finetun' .*Nearest: .*quickstart/finetune[,.]"),
        ("Quickstart/Generate", "'Quickstart/Generate' .*Nearest: .*quickstart/generate[,.]"),
        ("task/finetune", r".*python examples/spoken_commands\.py commands.* --config qa/finetune data_dir=commands$"),
        ("bfcl/eval", r".*python examples/function_calls\.py bfcl.* --config qa/eval data_dir=bfcl$"),
        ("llama3/8B_lora_layerskip", r".* --config llama3/8B_lora; .* extends: \[llama3/8B_lora, _layerskip\]$"),
        ("llama3_2/3B_full_layerskip", r".* extends: \[llama3_2/3B_full, _layerskip, _adamw\]$"),
        ("llama3_2/1B_full_single_devce", ".*Nearest: .*llama3_2/1B_full_single_device[,.]"),
        ("/nonexistent/mine.yaml", ".*layerskip ls"),
        ("", ".*layerskip ls"),
        ("x" * 5000, ".*layerskip ls"),
    ],
    ids=lambda value: value[:30],
)
def test_an_unknown_config_name_is_refused(name, message):
    with pytest.raises(ValueError, match=f"^config: {message}"):
        load_config(name)


# ---------------------------------------------------------------------------------------------------------- extends


def test_extends_is_relative_to_the_extending_file(base, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    write_yaml(tmp_path / "elsewhere" / base.name, {"epochs": 99})
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(extend(base)).epochs == 1


def test_later_keys_win_along_a_chain_and_the_command_line_over_all(base):
    middle = Path(extend(base, "middle.yaml", batch_size=3, epochs=3, layer_dropout={"prob": 0.3}))
    last = extend(middle, "last.yaml", epochs=4, layer_dropout={"layers_scale": "linear"}, metric_logger=None)
    config = load_config(last, ["seed=5", "layer_dropout.prob=0.5", "optimizer=null"])
    assert (config.max_steps_per_epoch, config.batch_size, config.epochs, config.seed) == (2, 3, 4, 5)
    assert config.layer_dropout == {"prob": 0.5, "layers_scale": "linear"}
    assert config.metric_logger is None and config.optimizer is None


def test_interpolations_follow_what_is_merged_later(base):
    """The base's log folder hangs on its output_dir; the extending file and the command line move it."""
    moved = str(Path(base).parent / "moved")
    path = extend(base, output_dir=moved, mine=3, batch_size="${mine}")
    config = load_config(path, ["epochs=${batch_size}"])
    assert (config.metric_logger.log_dir, config.batch_size, config.epochs) == (f"{moved}/logs", 3, 3)
    assert load_config(path, ["output_dir=/again"]).metric_logger.log_dir == "/again/logs"
    LayerSkipFinetune(load_config(path))  # a variable of the user's own is no unknown key


@pytest.mark.parametrize("numbered_first", [True, False])
def test_numbered_checkpoint_files_and_a_list_replace_each_other(numbered_first, base):
    numbered = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00003"}
    first, second = (numbered, ["a"]) if numbered_first else (["a"], numbered)
    middle = Path(extend(base, "middle.yaml", checkpointer={"checkpoint_files": first}))
    config = load_config(extend(middle, "last.yaml", checkpointer={"checkpoint_files": second}))
    assert config.checkpointer.checkpoint_files == second


def test_a_cycle_is_an_error_that_shows_it(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        write_yaml(tmp_path / f"{name}.yaml", {"extends": f"{base}.yaml"})
    with pytest.raises(ValueError, match=r"^extends: .*a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        load_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"extends: quickstart/finetun", "extends: 'quickstart/finetun' .*Nearest: quickstart/finetune"),
        (b"extends: [quickstart/finetune, nothere.yaml]", "extends: 'nothere.yaml'"),
        (b"a: [1\n", r"config: .*mine\.yaml"),
        (b"a: 1\na: 2\n", r"config: .*mine\.yaml"),
        (b"- a\n- b\n", r"config: .*mine\.yaml"),
        (b"", r"config: .*mine\.yaml"),
        (b"\xff\xfe\x00", r"config: .*mine\.yaml"),
        (b"a: ${\n", r"config: .*mine\.yaml"),
    ],
)
def test_a_file_with_a_mistake_is_refused(content, message, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{message}"):
        load_config(str(tmp_path / "mine.yaml"))


def test_byte_order_marks_windows_line_ends_and_slices_are_read(base):
    """A byte-order mark, Windows line ends, and a slice, which YAML 1.1 reads as 65: minutes and seconds."""
    path = base.parent / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfextends: finetune.yaml\r\nbatch_size: 7\r\nearly_exit_loss:\r\n  exits: 2:5\r\n")
    config = load_config(str(path))
    assert (config.batch_size, config.early_exit_loss.exits) == (7, "2:5")


# -------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.lr", "2e-5", 2e-5),
        ("optimizer.betas", "[0.8, 0.9]", [0.8, 0.9]),
        ("shuffle", "false", False),
        ("clip_grad_norm", "null", None),
        ("new.nested.key", "1", 1),
        ("new.max_filename", "00003", "00003"),
        ("layer_dropout", "{prob: 0.3, layers: '0::2'}", {"prob": 0.3, "layers": "0::2"}),
        ("output_dir", "a=b=c", "a=b=c"),
        ("output_dir", "${seed}/x", "0/x"),
        ("early_exit_loss.exits", ":", ":"),
        ("early_exit_loss.exits", "2:5", "2:5"),
        # A prompt is text, whatever YAML would make of it.
        ("prompt", "Question: who are you?", "Question: who are you?"),
        ("prompt.user", "What is 1 # 2?", "What is 1 # 2?"),
        ("prompt", "# a comment", "# a comment"),
        ("prompt", '"quoted" text', '"quoted" text'),
        ("prompt", "=", "="),
        ("prompt", "0x_", "0x_"),
        ("prompt", "{unfinished", "{unfinished"),
        ("prompt", "[a, b]", ["a", "b"]),
    ],
)
def test_an_override_has_the_type_that_it_is_written_in(key, text, value, base):
    got = OmegaConf.select(load_config(str(base), [f"{key}={text}"]), key)
    got = OmegaConf.to_container(got) if OmegaConf.is_config(got) else got
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "overrides", "expected"),
    [
        ("optimizer.betas", ["~optimizer.betas"], None),
        ("seed", ["seed=1", "~seed"], None),
        ("seed", ["~seed", "seed=1"], 1),
        ("new.key", ["new.key=1", "~new.key"], None),
        ("metric_logger", ["metric_logger=null", "metric_logger.a=1"], {"a": 1}),
    ],
)
def test_a_tilde_removes_a_key_and_overrides_count_in_their_order(key, overrides, expected, base):
    config = load_config(str(base), overrides)
    assert OmegaConf.select(config, key) == expected and "lr" in config.optimizer


def test_a_tilde_before_a_path_is_the_home_folder(base, monkeypatch):
    """In a file, where no shell expands it; what is no path stays as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    path = extend(base, output_dir="~/runs", compare={"old": {"checkpoint_files": ["~/a"]}})
    overrides = ["picture=~/x.png", "self_speculation.draft=~/run", "prompt=~/ls", "report=~me/x"]
    config = load_config(path, overrides)
    assert config.metric_logger.log_dir == "/home/me/runs/logs"
    assert config.compare.old.checkpoint_files == ["/home/me/a"]
    assert (config.picture, config.self_speculation.draft) == ("/home/me/x.png", "/home/me/run")
    assert (config.prompt, config.report) == ("~/ls", "~me/x")


@pytest.mark.parametrize("override", ["batch_size", "=3", "~nothere", "~optimizer.nothere", "~", ""])
def test_an_override_that_is_not_key_value_is_refused(override, base):
    with pytest.raises(ValueError, match=f"^override: '?{override}"):
        load_config(str(base), [override])


SGD = "torch.optim.SGD"  # takes lr and weight_decay as AdamW does, but no betas


@pytest.mark.parametrize("way", ["optimizer", "optimizer._component_", "file"])
def test_another_component_keeps_the_arguments_that_it_has(way, base):
    path = extend(base, optimizer={"_component_": SGD} if way == "file" else {})
    overrides = [] if way == "file" else [f"{way}={SGD}"]
    config = load_config(path, [*overrides, "optimizer.momentum=0.9"])
    assert config.optimizer == {"_component_": SGD, "lr": 1e-3, "weight_decay": 0.1, "momentum": 0.9}


def test_another_dataset_inherits_nothing(tmp_path):
    """hf/full holds the last 200 samples of Alpaca out, which means nothing for the user's data."""
    dataset = {"_component_": "torchtune.datasets.instruct_dataset", "source": "json", "data_files": "my.json"}
    component, *others = [f"dataset.{key}={value}" for key, value in dataset.items()]
    for first in (component, component.replace("._component_", "")):
        for overrides in ([first, *others], [*others, first], ["dataset.split=train[:9]", first, *others]):
            expected = dataset | ({"split": "train[:9]"} if len(overrides) == 4 else {})
            assert load_config("hf/task", overrides).dataset == expected
    assert load_config("hf/task", ["dataset={_component_: a.b, c: 1}"]).dataset == {"_component_": "a.b", "c": 1}
    assert load_config("hf/task", ["dataset=a.b", "dataset=c.d"]).dataset == {"_component_": "c.d"}
    assert load_config("hf/task", ["dataset.packed=true"]).dataset.split == "train[:-200]"
    path = tmp_path / "my.yaml"
    path.write_text(json.dumps({"extends": "hf/full", "model_dir": "model", "dataset": dataset}))
    assert "split" in load_config("hf/full").dataset
    assert load_config(str(path)).dataset == dataset
    path.write_text(json.dumps({"extends": "hf/full", "dataset": {"packed": True}}))
    assert load_config(str(path)).dataset == {**load_config("hf/full").dataset, "packed": True}


@pytest.mark.parametrize("first", [True, False])
def test_an_argument_given_beside_the_component_is_not_lost(first, base):
    """Only the base's arguments stay behind: what the user typed along is refused if the component lacks it."""
    overrides = ["optimizer.betas=[0.8,0.9]", f"optimizer={SGD}"]
    with pytest.raises(ValueError, match=r"^optimizer\.betas"):
        LayerSkipFinetune(load_config(str(base), overrides if first else overrides[::-1]))


# ------------------------------------------------------------------------------------------------ torchtune's configs


GENERATION = {config.name for recipe in get_all_recipes() if recipe.name == "generate" for config in recipe.configs}


@pytest.mark.parametrize("name", sorted(GENERATION))
def test_torchtunes_generation_configs_validate(name):
    validate(load_config(name, ["self_speculation.exit_layer=8", "self_speculation.num_speculations=6"]))
