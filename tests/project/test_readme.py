"""Every command of the README, of docs/ and of the config headers.

The quick tier checks them as written, by `layerskip validate`. The slow tier runs them as written, with overrides
appended that shorten a training, or put a tiny model in the place of one that has to be downloaded; not those of
results and lab notes, which are records of long runs.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import run_command
from helpers.configs import generate_config, make_checkpoint
from helpers.hf_folders import model_with_tokenizer
from helpers.pages import PAGES, ROOT, commands, examples
from helpers.ranks import run_tune_on_ranks
from omegaconf import DictConfig, OmegaConf

from layerskip_recipes.benchmark.tuner import FIRST_LINE
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import our_configs
from layerskip_recipes.folders.run_folder import mark_complete

# These set up an environment, download from the hub, or run these tests.
ELSEWHERE = (
    "python3 -m venv",
    ". .venv",
    "pip install",
    ".venv/bin/",
    "pre-commit",
    "tune download",
    "tune run layerskip_serve",  # tests/serving asks a server what the page asks
    "curl http://localhost:8000",
    "python tools/gpu_wheels",
    "python convert_hf_to_gguf",  # of llama.cpp
    "llama-server",
    "optimum-cli",  # of optimum-intel
    "python -m vllm",
    "python tools/compare_engines.py qa/benchmark",  # with engines of other packages
    "lm_eval",  # tests/evaluation/test_lm_eval.py
    "python tools/server_speed",  # of a running server
)
TUNE_RUN = {line: words for line, words in commands().items() if words[:2] == ["tune", "run"]}
TO_BE_RUN = {
    line: words
    for line, words in commands(page for page in PAGES if Path(page).stem not in ("results", "lab_notes")).items()
    if not line.startswith(ELSEWHERE)
}


def header_commands() -> dict[str, list[str]]:
    """The command lines in the headers of our configs that run here, and that no page has.

    The headers of SmolLM2 need the real model: test_real.py runs them. The configs of large models differ in values
    only: tests/config validates them, and one of each recipe is run here with a tiny model.
    """
    here = re.compile(r"quickstart/|llama3_2/1B_full_single_device_|llama3_2/1B_gen")
    found: dict[str, list[str]] = {}
    for path in our_configs().values():
        for line in re.findall(r"^#   ((?:tune run|layerskip) .*)$", path.read_text(encoding="utf-8"), flags=re.M):
            if here.search(line) and line not in TO_BE_RUN:
                found[line] = [word.strip("\"'") for word in re.findall(r'(?:[^\s"]|"[^"]*")+', line)]
    return found


TINY = "models/Qwen3-0.6B"
# Folders of runs that the pages decode with, by commands before.
MADE = ("qa", "trial", "out", "out_chat", "out_8b", "out_8b_trial", "out_commands")


def at_home(words: list[str], folder: Path) -> list[str]:
    """The command with the home folder in the workplace, whose one model stands in for larger ones."""
    for model in ("Qwen/Qwen3-0.6B", "~/models/Qwen3-8B", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        words = [word.replace(model, f"~/{TINY}") for word in words]
    return [word.replace("~/models", str(folder / "models")) for word in words]


def stand_in(config: str, overrides: list[str], folder: Path) -> list[str]:
    """The tiny model, as an override, in the place of one that a config reads and that is not here."""
    cfg = load_config(config, overrides)
    if "model_dir" not in [*cfg] or (folder / cfg.model_dir).is_dir() or str(cfg.model_dir).startswith(str(folder)):
        return []
    return [f"model_dir={folder / TINY}"]


def split(words: list[str]) -> tuple[str, str, list[str]]:
    """The recipe, the config and the overrides of a `tune run`."""
    place = words.index("--config")
    return words[place - 1], words[place + 1], words[place + 2 :]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer_folder) -> Path:
    """A folder to type commands in: the examples of the pages, the tools, and a tiny model."""
    folder = tmp_path_factory.mktemp("readme")
    for name, content in examples().items():
        (folder / name).write_text(at_home([content], folder)[0])
    # What the README downloads, and what trainings make of it.
    model = model_with_tokenizer("qwen3", folder / TINY, tokenizer_folder)
    for name in MADE:
        shutil.copytree(model, folder / name / "epoch_0")
        torch.save({}, folder / name / "epoch_0" / "recipe_state.pt")
        mark_complete(folder / name / "epoch_0", time=1.0)
    (folder / "my_data").mkdir()
    for name in ("train", "test"):
        (folder / "my_data" / f"{name}.jsonl").write_text('{"input": "wake me", "output": "07:00"}\n' * 8)
    (folder / "prompts.jsonl").write_text('{"prompt": {"user": "wake me"}}\n' * 4)
    for name in ("qa/benchmark", "benchmark", "benchmark_8b"):
        (folder / name).mkdir()
        (folder / name / "tuned.yaml").write_text(f"{FIRST_LINE}a test\nextends: hf/generate\nmodel_dir: {model}\n")
    for name in ("tools", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "configuration.md", folder / "docs")
    (folder / "stdlib.txt").write_text("def main(argv):\n    return 0\n" * 50)
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    checkpoint = make_checkpoint(folder / "model", tokenizer_folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = {"_component_": "layerskip_recipes.hf_tokenizer", "path": str(checkpoint), "chat_template": template}
    generate_config(folder, checkpoint, tokenizer=tokenizer, prompt={"user": "x"}).rename(folder / "tiny.yaml")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", TUNE_RUN)
def test_command_is_valid_as_written(line, workplace, layerskip, monkeypatch):
    recipe, config, overrides = split(at_home(TUNE_RUN[line], workplace))
    monkeypatch.chdir(workplace)
    status, out, err = layerskip("validate", config, *overrides, *stand_in(config, overrides, workplace))
    assert status == 0, err
    assert f"`tune run {recipe.replace('serve', 'generate')}`" in out  # a server takes generation configs


@pytest.mark.parametrize("name", examples())
def test_yaml_example_is_valid(name, workplace, layerskip, monkeypatch):
    monkeypatch.chdir(workplace)
    status, _, err = layerskip("validate", name)
    assert status == 0, err


# ---- in their short forms ----

FEW = {"max_new_tokens": 9, "repeats": 1, "temperatures": [0.0], "compile": False}
DATA = {"_component_": "layerskip_recipes.quickstart.StdlibDataset", "split": "heldout", "seq_len": 32}
DATA["max_samples"] = 4
QUICKSTART = {
    "layerskip_finetune": {
        "max_steps_per_epoch": 2,
        "log_every_n_steps": 1,
        "dataset": DATA | {"seq_len": 64, "max_samples": 16},
    },
    "layerskip_generate": {"max_new_tokens": 6},
    "layerskip_eval": {"dataset.max_samples": 8, "exits": ":"},
    "layerskip_benchmark": FEW | {"max_new_tokens": 16},
}
TOOLS_OPTIONS = {
    "tools/training_cost.py": "model.num_layers=4 early_exit_loss.exits=: "
    "--repeats 1 --steps 1 --batch 1 --seq-len 16 --method ours",
    "tools/compare_engines.py": "model.num_layers=4 model.vocab_size=300 output_dir=quickstart max_new_tokens=4 "
    "prompts.count=1 repeats=1 temperatures=[0.0] compile=false",
    "tools/gpu_report.py": "--list",  # test_gpu_report.py runs the steps
}


def flat(content: dict[str, Any], prefix: str = "") -> list[str]:
    """A config as command-line overrides; a section's component first."""
    overrides = []
    for key, value in sorted(content.items(), key=lambda item: item[0] != "_component_"):
        if isinstance(value, dict):
            overrides += flat(value, f"{prefix}{key}.")
        else:
            name = prefix.rstrip(".") if key == "_component_" else f"{prefix}{key}"
            overrides.append(f"{name}={json.dumps(value) if not isinstance(value, str) else value}")
    return overrides


def shortened(line: str, words: list[str], folder: Path) -> list[str]:
    """The command with overrides that make it small."""
    words = at_home(words, folder)
    if words[:2] != ["tune", "run"]:
        return [*words, *TOOLS_OPTIONS.get(words[1], "").split()]
    recipe, config, overrides = split(words)
    cfg = load_config(config, overrides)
    if config.startswith("quickstart/"):
        changes = quickstart_changes(recipe, cfg, folder)
        if line == "tune run layerskip_generate --config quickstart/generate":
            del changes["compile"]  # the others decode uncompiled
    elif "model_dir" in [*cfg]:
        changes = {"device": "cpu", "dtype": "fp32"} | large_changes(recipe, cfg, folder)
        words = [*words, *stand_in(config, overrides, folder)]
    else:  # of torchtune's builders
        tiny = OmegaConf.to_container(OmegaConf.load(folder / "tiny.yaml"))
        changes = {key: tiny[key] for key in ("model", "checkpointer", "tokenizer", "device", "dtype")}
        if recipe == "layerskip_finetune":
            del changes["checkpointer"]["output_dir"]
            changes["output_dir"] = str(folder / Path(cfg.output_dir).name)
            changes["optimizer"] = {"_component_": "torch.optim.AdamW"}  # torchao's compiles its steps for 10 seconds
        else:
            changes["self_speculation"] = {"exit_layer": 2, "num_speculations": 2}
        changes |= large_changes(recipe, cfg, folder)
    return [*words, *flat(changes)]


def quickstart_changes(recipe: str, cfg: DictConfig, folder: Path) -> dict[str, Any]:
    changes = {"model.num_layers": 4, "model.vocab_size": 300, "output_dir": "quickstart"} | QUICKSTART[recipe]
    if recipe == "layerskip_finetune":
        changes["tokenizer.path"] = str(folder / "tokenizer")
    if recipe == "layerskip_generate":
        changes["compile"] = False
        if cfg.get("self_speculation") is not None:
            changes["self_speculation.num_speculations"] = 2
    if cfg.get("temperature") is not None:
        changes.pop("temperatures", None)
    if cfg.get("prompts") is not None:
        changes["prompts.count"] = max(2, cfg.get("batch_size") or 1)
    return changes


def large_changes(recipe: str, cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """What makes the run of a large model's config a short one of a tiny model."""
    if recipe == "layerskip_finetune":
        changes: dict[str, Any] = {"dataset": DATA, "batch_size": 2, "gradient_accumulation_steps": 1, "epochs": 1}
        changes["keep_last_n_checkpoints"] = None  # several pages train in the same folder
        smaller = {
            "draft.exit_layer": 1,
            "dataset_val": DATA,
            "early_exit_loss.exits": "2",
            "tokenizer.max_seq_len": 64,
            "model.lora.quantize_base": False,  # the tiny model's matrices are too small for 4 bits
        }
        changes |= {key: value for key, value in smaller.items() if OmegaConf.select(cfg, key) not in (None, "auto")}
        of_command = OmegaConf.select(cfg, "dataset.path") == "answers.jsonl"  # written by the command before
        if cfg.get("data_dir") is not None or of_command:  # the workplace has its files
            changes.pop("dataset"), changes.pop("dataset_val", None)
            changes["dataset.count"] = 8
        return changes | (
            {"output_dir": str(folder / "trained_draft")}
            if cfg.get("draft") is not None and not cfg.draft.get("finetune_model")
            else {}
        )
    draft = OmegaConf.select(cfg, "self_speculation.draft")
    missing = draft is not None and not (folder / draft).is_dir()  # a tuned config names the draft that won
    drafts = {"self_speculation.draft": str(folder / "trained_draft" / "epoch_0")} if missing else {}
    if recipe == "layerskip_generate":
        few = {"prompts.count": 2} if cfg.get("prompts") is not None else {}
        return {"max_new_tokens": 6, "compile": False} | drafts | few
    if recipe == "layerskip_eval":
        compare = {name: {"path": str(folder / TINY)} for name in cfg.get("compare") or ()}
        data = {} if cfg.get("data_dir") is not None else {"dataset": DATA}
        return data | {"max_batches": 1} | ({"compare": compare} if compare else {})
    few = {key: value for key, value in FEW.items() if key != "temperatures" or cfg.get("temperature") is None}
    return few | drafts | ({"prompt_tokens": 16} if cfg.get("random_weights") else {})


@pytest.fixture(scope="module")
def run(workplace):
    """Runs a command in its short form. Of commands that mean the same then, the first one's result serves all."""
    finished: dict[str, subprocess.CompletedProcess] = {}

    def run(line: str, words: list[str]) -> subprocess.CompletedProcess:
        short = shortened(line, words, workplace)
        meaning = line
        if "--config" in short:
            place = short.index("--config") + 1
            merged = load_config(short[place], short[place + 1 :])
            meaning = f"{short[:place]}\n{OmegaConf.to_yaml(merged, sort_keys=True)}"
        if meaning not in finished:
            if short[0] == "python":
                short = [str(workplace / short[1]), *short[2:]]
            if "--nproc_per_node" in short:
                place = short.index("--nproc_per_node")
                ranks = run_tune_on_ranks(*short[1:place], *short[place + 2 :], cwd=workplace)
                finished[meaning] = max(ranks, key=lambda rank: rank.returncode != 0)  # the one that failed, or any
            else:
                finished[meaning] = run_command(*short, cwd=workplace, timeout=900)
        return finished[meaning]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        for name in MADE:
            shutil.rmtree(workplace / name)
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("line", TO_BE_RUN)
def test_command_runs(line, run):
    """In the order of the pages: the quickstart's checkpoint and the files that are copied serve later commands."""
    done = run(line, TO_BE_RUN[line])
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("line", header_commands())
def test_config_header_command_runs(line, run):
    done = run(line, header_commands()[line])
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_what_the_lines_on_a_model_of_ones_own_say(run, workplace):
    """Training, generation, benchmark, and generation as the benchmark found it best."""
    done = [
        run(line, TO_BE_RUN[line])
        for line in [line for line in TO_BE_RUN if " qa/" in line and "out_commands" not in line][:4]
    ]
    assert [command.returncode for command in done] == [0, 0, 0, 0]
    said = [command.stdout + command.stderr for command in done]
    assert "Chosen for this model and machine: " in said[0] and "draft.exit_layer=1" in said[0]
    assert "Drafts: trained draft, " in said[1] or "No drafts: the trained draft should not pay" in said[1]
    assert '"acceptance_rate"' in said[1]
    assert "written to qa/benchmark/tuned.yaml" in said[2]
    best = OmegaConf.load(workplace / "qa" / "benchmark" / "tuned.yaml")
    assert best.model_dir in (f"{workplace}/qa", f"{workplace}/qa/epoch_0")  # the draft's checkpoint, if it pays
