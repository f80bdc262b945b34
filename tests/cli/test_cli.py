"""The command line: `layerskip ls / cp / cat / validate`, and what `tune run` shows after a user's mistake."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import last_line, run_tune
from helpers.configs import finetune_config, generate_config, make_checkpoint, write_yaml
from helpers.hf_folders import make_hf_folder

from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.cli.configs import recipe_of
from layerskip_recipes.cli.recipes import evaluate as evaluate_main
from layerskip_recipes.cli.recipes import finetune as finetune_main
from layerskip_recipes.cli.recipes import generate as generate_main
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import find_config, our_configs

CHAIN = {"chain": {"exit_layer": 3, "num_speculations": 6}}


def mistake(result: tuple[int, str, str]) -> str:
    """The one line on stderr of a command that failed as it should."""
    status, out, err = result
    assert status == 1 and out == ""
    assert err.startswith("ValueError: ") and err.count("\n") == 1
    return err


# -------------------------------------------------------------------------------------------------------- layerskip


@pytest.mark.slow
def test_ls_names_what_the_other_commands_take(layerskip):
    """Ours first, none of the _*.yaml that are only there to be extended; each name leads to a file."""
    status, out, _ = layerskip("ls")
    lines = [line.split() for line in out.splitlines() if line.startswith("  ")]
    names, ours = [line[0] for line in lines], len(our_configs())
    assert status == 0 and names[:ours] == list(our_configs())
    assert lines[:ours] == [[name, recipe_of(load_config(name))] for name in our_configs()]
    assert "llama3_2/1B_full_single_device" in names and not any("/_" in name for name in names)
    for name in names:
        assert find_config(name).is_file()


@pytest.mark.parametrize("target", ["mine.yaml", "mine", "folder/mine.yaml", "folder"])
def test_cp_copies_the_file_with_its_comments(target, layerskip):
    """A missing .yaml is added; a folder that exists gets the file under its own name."""
    if target == "folder":
        Path(target).mkdir()
    status, out, _ = layerskip("cp", "quickstart/finetune", target)
    path = Path({"mine": "mine.yaml", "folder": "folder/finetune.yaml"}.get(target, target))
    assert status == 0 and str(path) in out
    assert path.read_text().startswith("# Quickstart")


@pytest.mark.parametrize("name", {name.partition("/")[0]: name for name in our_configs()}.values())
def test_a_copy_means_the_same_from_anywhere(name, layerskip):
    """A config of each folder; also where the original extends a file beside it."""
    layerskip("cp", name, "mine.yaml")
    assert load_config("mine.yaml") == load_config(name)


def test_cp_overwrites_nothing(layerskip):
    Path("mine.yaml").write_text("mine: 1\n")
    assert "cp: 'mine.yaml' exists" in mistake(layerskip("cp", "quickstart/finetune", "mine.yaml"))
    assert "cp: 'mine.yaml' cannot be written" in mistake(layerskip("cp", "quickstart/finetune", "mine.yaml/mine.yaml"))
    assert Path("mine.yaml").read_text() == "mine: 1\n"


def test_cat_shows_the_merged_config(layerskip):
    """Its output is a config by itself: nothing left to extend, overrides applied, interpolations kept."""
    _, out, _ = layerskip("cat", "quickstart/generate", "temperature=0.8")
    Path("mine.yaml").write_text(out)
    expected = load_config("quickstart/generate", ["temperature=0.8"])
    assert "extends" not in out and "${output_dir}" in out
    assert load_config("mine.yaml") == expected and expected.temperature == 0.8


@pytest.mark.parametrize("recipe", ["finetune", "generate", "eval"])
def test_validate_needs_and_writes_nothing(recipe, layerskip):
    """Neither the checkpoint nor the device, and the tokenizer that the quickstart trains is not trained."""
    status, out, _ = layerskip("validate", f"quickstart/{recipe}", "device=cuda")
    assert status == 0 and f"tune run layerskip_{recipe}" in out
    assert list(Path().iterdir()) == []


def test_validate_downloads_no_weights(layerskip, tmp_path, monkeypatch):
    """Of a model on the hub; those who read weights ask for them."""
    repository, asked = tmp_path / "hub", []
    make_hf_folder("llama", repository)

    def download(name, allow_patterns, revision):
        asked.extend(allow_patterns)
        return str(repository)

    monkeypatch.setattr("layerskip_recipes.folders.model_folder.snapshot_download", download)
    name = f"someone/{tmp_path.name}"  # downloads are kept by name
    given = [f"model_dir={name}", "data_dir=my_data", "device=cpu"]
    for config in ("hf/full", "qa/finetune", "qa/draft", "hf/generate", "hf/eval", "qa/benchmark"):
        status, _, err = layerskip("validate", config, *given[: 3 if config.startswith("qa") else 1])
        assert status == 0, err
    assert "*.json" in asked and not any("safetensors" in pattern for pattern in asked)
    HFCheckpointer(name)
    assert "model*.safetensors" in asked


def test_a_component_beside_the_config_is_found(layerskip, monkeypatch):
    """As by `tune run`, which looks in the current folder too; so does `cat`, for what a new component takes."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_own_data.py").write_text("def dataset(tokenizer, length): ...\n")
    section = {"_component_": "my_own_data.dataset", "length": 3}
    write_yaml(Path("mine.yaml"), {"extends": "quickstart/finetune", "dataset": section})
    status, _, err = layerskip("validate", "mine.yaml")
    assert status == 0, err
    status, out, err = layerskip("cat", "mine.yaml")
    assert status == 0 and "length: 3" in out and "split: train" not in out, err


def test_validate_knows_the_recipe_of_configs_that_extend_a_generation_config(layerskip):
    root = Path(__file__).parents[2]
    (example,) = re.findall(r"^```yaml\n# my.yaml\n(.*?)^```$", (root / "README.md").read_text(), flags=re.S | re.M)
    Path("my.yaml").write_text(example)
    layerskip("cp", "llama3_2/1B_generate_layerskip", "my_generate.yaml")
    off = dict.fromkeys(("self_speculation", "temperature", "benchmark"))
    data = {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "split": "train[:200]"}
    for name, keys in {
        "my_eval": off | {"prompt": None, "max_new_tokens": None, "compile": None, "dataset": data},
        "my_benchmark": off | {"variants": CHAIN, "report_dir": "benchmark"},
    }.items():
        write_yaml(Path(f"{name}.yaml"), {"extends": "my_generate.yaml", **keys})
    recipes = {"my": "finetune", "my_generate": "generate", "my_eval": "eval", "my_benchmark": "benchmark"}
    for name, recipe in recipes.items():
        status, out, err = layerskip("validate", f"{name}.yaml")
        assert status == 0 and out == f"{name}.yaml: fine, for `tune run layerskip_{recipe}`\n", err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # What stays of the generation config is refused by the recipe that is meant.
        ({"variants": CHAIN, "report_dir": "x"}, "self_speculation: .* beside variants"),
        ({"variants": CHAIN, "self_speculation": None, "benchmark": None}, "report_dir: None"),
        ({"tasks": ["arc_easy"], "temperature": 0.8}, "tasks: removed"),
    ],
)
def test_validate_knows_the_recipe_of_a_config_with_a_mistake(change, message, layerskip):
    write_yaml(Path("mine.yaml"), {"extends": "quickstart/generate", **change})
    status, _, err = layerskip("validate", "mine.yaml")
    assert status == 1 and re.search(f"^ValueError: {message}", err, flags=re.M)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("validate quickstart/generate device=gpu", "device: 'gpu' is not allowed. Allowed: text that"),
        ("validate quickstart/finetun", "Nearest: quickstart/finetune"),
        ("cat quickstart/finetun", "Nearest: quickstart/finetune"),
        ("cat quickstart/finetune batch_size", "override: 'batch_size'"),
        ("cp quickstart/finetun mine.yaml", "Nearest: quickstart/finetune"),
        ("export nowhere out", "export: 'nowhere' is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(args, message, layerskip):
    assert message in mistake(layerskip(*args.split()))
    assert list(Path().iterdir()) == []


def test_all_mistakes_are_reported_at_once(layerskip):
    """Types, unknown keys and components first; what does not go together once these are right."""
    wrong = {
        "batch_size=0": "batch_size: 0 is not allowed. Allowed: an integer of 1 or more (or auto)",
        "epoch=2": "epoch: unknown key. Nearest: epochs",
        "optimizer.learning_rate=1": "optimizer.learning_rate: torch.optim.AdamW takes no such argument.",
        "optimizer.momentum=1": "optimizer.momentum: torch.optim.AdamW takes no such argument.",
        "tokenizer._component_=nothing.here": "tokenizer._component_: 'nothing.here' cannot be imported",
        "layer_dropout.prob=2": "layer_dropout.prob: 2 is not allowed.",
        "fsdp={cpu_offload: true}": "fsdp: {'cpu_offload': True} is not honoured by this recipe",
    }
    status, out, err = layerskip("validate", "quickstart/finetune", *wrong)
    lines = err.splitlines()
    assert status == 1 and out == "" and len(lines) == len(wrong)
    for message in wrong.values():
        assert sum(line.startswith(f"ValueError: {message}") for line in lines) == 1, message
    together = ["dtype=bf16", "compute_dtype=bf16", "ac_option=2", "early_exit_loss.exits=99", "exits_val=2"]
    status, _, err = layerskip("validate", "quickstart/finetune", *together)
    keys = [line.split(":")[1].strip() for line in err.splitlines()]
    assert status == 1 and sorted(keys) == ["ac_option", "early_exit_loss.exits", "exits_val"]


@pytest.mark.parametrize("args", ["", "foo", "cp quickstart/finetune", "validate", "ls --all", "validate x a=1 --b=3"])
def test_a_wrong_command_shows_the_usage(args, layerskip):
    status, out, err = layerskip(*args.split())
    assert status == 2 and out == "" and "usage: layerskip" in err


@pytest.mark.slow
@pytest.mark.parametrize("args", [["ls"], ["cat", "hf/full"]])
def test_a_command_that_builds_nothing_does_not_wait_for_torch(args, tmp_path):
    code = f"import sys; sys.argv = {['layerskip', *args]}; sys.modules['torch'] = None  # an import of it fails\n"
    code += "from layerskip_recipes.cli.commands import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.slow
def test_the_installed_command_writes_into_a_pipe_that_ends(tmp_path):
    """`layerskip ls | head -1` has all that it wants, from a folder that is not the checkout."""
    command = f"{Path(sys.executable).with_name('layerskip')} ls | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == "layerskip configs\n" and "Error" not in done.stderr


# --------------------------------------------------------------------------------------------------------- tune run


def test_a_config_of_another_recipe_is_recognised(monkeypatch, capsys):
    for start, config, meant in (
        (generate_main, "quickstart/finetune", "layerskip_finetune"),
        (finetune_main, "quickstart/generate", "layerskip_generate"),
        (evaluate_main, "quickstart/finetune", "layerskip_finetune"),
    ):
        monkeypatch.setattr(sys, "argv", ["recipe", "device=cpu", "--config", config, "seed=1"])  # on both sides
        with pytest.raises(SystemExit, match="1"):
            start()
        err = capsys.readouterr().err
        assert ": unknown key. " in err
        assert err.endswith(f"\nValueError: config: {config} looks like one for `tune run {meant}`\n")


@pytest.mark.parametrize("start", [finetune_main, generate_main, evaluate_main])
@pytest.mark.parametrize("flag", ["--batch_size=3", "--batch_size"])
def test_an_option_instead_of_an_override_is_refused(start, flag, monkeypatch, capsys):
    """What other trainers want; here it is refused before the config is even looked for."""
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", "nothere.yaml", flag])
    with pytest.raises(SystemExit, match="1"):
        start()
    assert capsys.readouterr().err.startswith(f"ValueError: argument: '{flag}' is unknown. Allowed: --config NAME and")


@pytest.fixture
def folder(tmp_path, tokenizer_folder):
    """A folder with finetune.yaml and generate.yaml, to start from."""
    finetune_config(tmp_path, tokenizer_folder)
    generate_config(tmp_path, make_checkpoint(tmp_path / "checkpoint", tokenizer_folder))
    return tmp_path


def test_a_users_mistake_is_the_last_line_of_tune_run(folder):
    """From inside of torch: the last line on stderr says it; status 1, no traceback, and nothing is written."""
    before = sorted(folder.iterdir())
    done = run_tune("run", "layerskip_finetune", "--config", "finetune.yaml", "optimizer.betas=[2,2]", cwd=folder)
    assert last_line(done.stderr).startswith("ValueError: optimizer: ") and done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert sorted(folder.iterdir()) == before


@pytest.mark.slow
@pytest.mark.distributed
def test_a_users_mistake_is_one_line_under_torchrun(folder):
    """The same line; torchrun then adds its own report of the failed process, which nobody can keep it from."""
    args = ["--nnodes", "1", "--nproc_per_node", "1", "layerskip_finetune", "--config", "finetune.yaml", "epochs=0"]
    done = run_tune("run", *args, cwd=folder)
    ours, _, torchruns = done.stderr.partition("ChildFailedError")
    assert done.returncode == 1 and torchruns
    line = next(line for line in ours.splitlines() if line.startswith("ValueError: epochs: 0 "))
    assert "Traceback" not in ours[: ours.index(line)]
    assert not (folder / "out").exists()


def test_help_shows_how_to_start_the_recipe(folder):
    """`--help` after a config (torchtune insists on one) shows what the recipe is, and how to start it."""
    done = run_tune("run", "layerskip_generate", "--config", "generate.yaml", "--help", cwd=folder)
    assert done.returncode == 0
    assert "usage: layerskip_generate" in done.stdout and "tune run layerskip_generate --config" in done.stdout


def test_a_bug_keeps_its_traceback(folder):
    """Only a mistake in the config is cut down to a line: an error in a component of the user's own must show where."""
    (folder / "mine.py").write_text("def dataset(tokenizer):\n    raise ValueError('no sample')\n")
    write_yaml(folder / "mine.yaml", {"extends": "finetune.yaml", "dataset": {"_component_": "mine.dataset"}})
    done = run_tune("run", "layerskip_finetune", "--config", "mine.yaml", cwd=folder)
    assert done.returncode == 1
    assert "mine.py" in done.stderr and "ValueError: no sample" in done.stderr
