"""Every command and every example of the README and of the config headers, run as written.

Only the size changes: overrides are appended that shorten a training, or put a tiny model in a gated one's place.
"""

import doctest
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers.commands import run_command
from helpers.configs import HF_CONFIG, MODEL, finetune_config, generate_config, make_checkpoint
from omegaconf import OmegaConf

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import our_configs
from layerskip_recipes.generation import api
from layerskip_recipes.model import decoder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.S | re.M)


def commands() -> list[str]:
    """The README's command lines, those joined by && taken apart."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


def header_commands() -> list[str]:
    """The command lines in the headers of our configs."""
    found = []
    for path in our_configs().values():
        found += re.findall(r"^#   ((?:tune|layerskip) .*)$", path.read_text(), flags=re.M)
    return found


def flat(content: dict, prefix: str = "") -> list[str]:
    """A config as command-line overrides; a section's component first."""
    overrides = []
    for key, value in sorted(content.items(), key=lambda item: item[0] != "_component_"):
        if isinstance(value, dict):
            overrides += flat(value, f"{prefix}{key}.")
        else:
            name = prefix.rstrip(".") if key == "_component_" else f"{prefix}{key}"
            overrides.append(f"{name}={json.dumps(value) if not isinstance(value, str) else value}")
    return overrides


# In processes of their own, as a user starts them; the others are forks.
COLD = [f"tune run layerskip_{recipe} --config quickstart/{recipe}" for recipe in ("finetune", "generate", "eval")]
# A compiled draft is one graph of num_speculations steps.
QUICKSTART = {
    "quickstart/finetune": ["max_steps_per_epoch=2", "log_every_n_steps=1"],
    "quickstart/generate": ["max_new_tokens=6", "prompts.count=2", "self_speculation.num_speculations=2"],
    "quickstart/eval": ["max_batches=1"],
    "quickstart/benchmark": [
        *("max_new_tokens=16", "prompts.count=2", "repeats=1", "temperatures=[0.0]", "compile=false"),
    ],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer_folder):
    """A folder to type commands in: the README's files, and a tiny model to put in the place of theirs."""
    folder = tmp_path_factory.mktemp("readme")
    for example in blocks("yaml"):
        (folder / re.match(r"# (my\w*\.yaml)\n", example)[1]).write_text(example)
    checkpoint = make_checkpoint(folder / "model", tokenizer_folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = {"_component_": "layerskip_recipes.hf_tokenizer", "path": str(checkpoint), "chat_template": template}
    generate_config(folder, checkpoint, tokenizer=tokenizer, prompt={"user": "x"}).rename(folder / "tiny.yaml")
    return folder


def shortened(command: list[str], folder: Path) -> list[str]:
    """The command with overrides that make it small."""
    if command[:2] != ["tune", "run"]:
        return command
    name = command[command.index("--config") + 1]
    if name in QUICKSTART:
        few = ["sweep.exit_layers=[1,2]", "sweep.num_speculations=[2]"] if "sweep={}" in command else []
        return [*command, *few, "model.num_layers=4", *QUICKSTART[name]]
    tiny = OmegaConf.to_container(OmegaConf.load(folder / "tiny.yaml"))
    keep = ("model", "checkpointer", "tokenizer", "device", "dtype")
    model = flat({key: tiny[key] for key in keep})
    if "layerskip_generate" in command:
        draft = ["self_speculation.exit_layer=2", "self_speculation.num_speculations=2"]
        return [*command, *model, "max_new_tokens=6", *([] if name == "my_tuned.yaml" else draft)]
    if "layerskip_eval" in command:
        data = {"_component_": "layerskip_recipes.quickstart.StdlibDataset", "split": "heldout", "seq_len": 32}
        return [*command, *model, *flat({"dataset": data}), "max_batches=1"]
    if "layerskip_benchmark" in command:
        exits = ["variants.chain.exit_layer=2", "variants.lookup.exit_layer=2"]
        return [*command, *model, *exits, "max_new_tokens=9", "repeats=1", "temperatures=[0.0]"]
    content = OmegaConf.to_container(OmegaConf.load(finetune_config(folder, folder / "model")))
    content |= {key: tiny[key] for key in ("model", "checkpointer", "tokenizer")}
    del content["checkpointer"]["output_dir"]  # stays ${output_dir}
    keep = ("model", "tokenizer", "dataset", "checkpointer", "batch_size", "max_steps_per_epoch", "device", "dtype")
    few = ["gradient_accumulation_steps=1", f"output_dir={folder / 'out'}"]
    return [*command, *flat({key: content[key] for key in keep}), *few]


@pytest.fixture(scope="module")
def run(workplace):
    """Runs a command in its small form. Of those that mean the same then, the first one's result serves all."""
    finished: dict[str, subprocess.CompletedProcess] = {}

    def run(command: str) -> subprocess.CompletedProcess:
        words = shortened(shlex.split(command), workplace)
        meaning = command
        if "--config" in words:
            place = words.index("--config") + 1
            merged = load_config(words[place], words[place + 1 :])
            meaning = f"{words[:place]}\n{OmegaConf.to_yaml(merged, sort_keys=True)}"
        if meaning not in finished:
            finished[meaning] = run_command(*words, cwd=workplace, timeout=900, cold=command in COLD)
        return finished[meaning]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        yield run


# The environment is there, the hub is not, the tests are running already, and test_cli.py and test_decoding_cost.py run
# the measurements.
NOT_HERE = (
    "python3 -m venv",
    ". .venv",
    "pip install",
    ".venv/bin/",
    "tune download",
    "layerskip cost",
    "layerskip decoding-cost",
)


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(NOT_HERE)])
def test_readme_command(command, run):
    """In the README's order; the quickstart's checkpoint serves the commands after it."""
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]


def runs_here(command: str) -> bool:
    """SmolLM2's headers need the real model: tests/test_real.py runs them. The large models' configs differ in values
    only: tests/test_family_configs.py validates them, and one of each recipe is run here with a tiny model."""
    return bool(re.search(r"(quickstart/|llama3_2/1B_full_single_device_|llama3_2/1B_gen)", command))


@pytest.mark.parametrize("command", [c for c in header_commands() if runs_here(c) and c not in commands()])
def test_config_header_command(command, run):
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("module", [api, decoder], ids=lambda module: module.__name__)
def test_examples_of_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted >= 2 and result.failed == 0


def test_python_example():
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})


def test_every_key_of_the_sections_is_in_the_readme():
    import inspect

    from layerskip_recipes.generation.drafting.section import self_speculation
    from layerskip_recipes.model.layer_dropout import LayerDropout
    from layerskip_recipes.training.early_exit import EarlyExitLoss

    for name in inspect.signature(self_speculation).parameters:
        assert f"`self_speculation.{name}`" in README
    for name in inspect.signature(LayerDropout).parameters.keys() - {"num_layers", "seed", "batch_size"}:
        assert f"`layer_dropout.{name}`" in README
    for name in inspect.signature(EarlyExitLoss).parameters.keys() - {"ignore_index", "label_smoothing"}:
        assert f"`early_exit_loss.{name}`" in README


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/results.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).is_file(), target


def test_the_file_map_is_the_tree():
    """Each module of the package is in the README's map, and nothing else is."""
    (section,) = re.findall(r"## Where things are\n\n```\n(.*?)```", README, flags=re.S)
    named = set(re.findall(r"\b\w+\.py\b", section))
    package = ROOT / "layerskip_recipes"
    assert named == {p.name for p in [*package.glob("*.py"), *package.glob("recipes/*.py")]} - {"__init__.py"}
    assert MODEL["num_layers"] == HF_CONFIG["num_hidden_layers"]
