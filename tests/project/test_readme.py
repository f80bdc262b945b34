"""Every command of the README, of docs/ and of the config headers.

The comment `<!-- short: .. -->` before a block has overrides for a short run. The quick tier checks each command with
them by `layerskip validate`. The slow tier runs those that differ in more than names of folders, where the models and
data that pages name are tiny, and with the overrides of SHORT. It does not run the commands of results and lab notes,
which are records of long runs.
"""

import json
import re
import shlex
import shutil
from functools import cache

import pytest
import torch
from helpers.commands import run_command
from helpers.hf_folders import model_with_tokenizer
from helpers.json_lines import change_json
from helpers.pages import PAGES, ROOT, commands_and_short_runs, examples
from helpers.ranks import run_tune_on_ranks
from omegaconf import OmegaConf

from layerskip_recipes.benchmark.tuner import FIRST_LINE
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import our_configs
from layerskip_recipes.data import standard_library
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
    "python tools/compare_engines.py",  # with engines of other packages
    "lm_eval",  # tests/evaluation/test_lm_eval.py
    "python examples/spoken_commands",  # tests/project/test_task_scripts.py
    "python tools/server_speed",  # of a running server
)
TUNE_RUN = {
    line: (words, short) for line, (words, short) in commands_and_short_runs().items() if words[:2] == ["tune", "run"]
}
IN_README = re.findall(r"^\| \[(docs/\w+\.md)\]", PAGES["README.md"].read_text(encoding="utf-8"), flags=re.M)
# Names of folders, and a length that SHORT sets for all: commands that differ in no other key do the same here.
PLACES = {"model_dir", "data_dir", "output_dir", "report_dir", "max_steps_per_epoch"}


def shape(line: str, words: list[str]) -> object:
    """What a run of the command shows: of `tune run` the recipe, its config and the keys, of others the whole line."""
    if words[:2] != ["tune", "run"]:
        return line
    place = words.index("--config")
    keys = {word.partition("=")[0] for word in words[place + 2 :]} - PLACES
    if words[place + 1] == "hf/draft":  # later commands need its draft
        keys |= {word for word in words if word.startswith("output_dir=")}
    return (*words[: place + 2], *sorted(keys))


RUNNABLE = {
    line: words_and_short
    for line, words_and_short in commands_and_short_runs(
        ["README.md", *(page for page in IN_README if page != "docs/results.md")]
    ).items()
    if not line.startswith(ELSEWHERE)
}
FIRST = {shape(line, words): line for line, (words, _) in reversed(RUNNABLE.items())}
TO_BE_RUN = {line: found for line, found in RUNNABLE.items() if line in FIRST.values()}
SHORT = {
    "layerskip_finetune": ["max_steps_per_epoch=2", "keep_last_n_checkpoints=null"],  # pages train in the same folders
    "layerskip_generate": ["max_new_tokens=6"],
    "layerskip_eval": ["max_batches=1"],
    "layerskip_benchmark": ["max_new_tokens=9", "repeats=1"],
}
MODELS = ("Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct",
          "models/Qwen3-0.6B", "models/Qwen3-8B", "Qwen2.5-Coder-1.5B")  # fmt: skip
# Runs of commands, by whose checkpoints later commands start.
MADE = ("qa", "trial", "out_chat", "out_8b", "out_8b_trial", "out_llama", "out_commands", "out_bfcl", "out_index",
        "out_csharp", "out_states")  # fmt: skip
# The tiny model in the place of one of torchtune's builders. torchao's AdamW would compile its steps for 10 seconds.
BUILT = [f"{key}={{_component_: layerskip_recipes.hf_{component}, path: my_model}}" for key, component in
         (("model", "decoder"), ("checkpointer", "checkpointer"), ("tokenizer", "tokenizer"))]  # fmt: skip
BUILT += ["device=cpu", "dtype=fp32"]
ADAMW = ["optimizer._component_=torch.optim.AdamW"]


def header_commands() -> dict[str, tuple[list[str], list[str]]]:
    """The command lines in the headers of our configs that run here, and whose recipe and config no page has.

    The headers of SmolLM2 need the real model: test_real.py runs them. The configs of large models differ in values
    only: tests/config validates them, and one of each recipe is run here with a tiny model.
    """
    here = re.compile(r"quickstart/|llama3_2/1B_full_single_device_|llama3_2/1B_gen")
    headers = [path.read_text(encoding="utf-8") for path in our_configs().values()]
    lines = [line for header in headers for line in re.findall(r"^#   (tune run .*)$", header, flags=re.M)]
    found = {line: shlex.split(line) for line in lines if here.search(line) and line not in TO_BE_RUN}
    on_pages = {tuple(words[:5]) for words, _ in TO_BE_RUN.values()}
    return {line: (words, []) for line, words in found.items() if tuple(words[:5]) not in on_pages}


@pytest.fixture(scope="module", autouse=True)
def few_texts():
    """Those that are held out are enough for the quickstart's tokenizer and prompts."""
    texts = standard_library.stdlib_texts("heldout")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standard_library, "stdlib_texts", lambda split: texts)
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer_folder):
    """The home folder and the working directory of a user who has tiny models and data by the names of the pages."""
    folder = tmp_path_factory.mktemp("readme")
    model = model_with_tokenizer("qwen3", folder / "my_model", tokenizer_folder)
    change_json(model / "config.json", max_position_embeddings=512)
    for name in MODELS:
        shutil.copytree(model, folder / name)
    for name, content in examples().items():
        (folder / name).write_text(content)
    for name in ("out", *MADE):
        checkpoint = shutil.copytree(model, folder / name / "epoch_0")
        torch.save({}, checkpoint / "recipe_state.pt")
        mark_complete(checkpoint, time=1.0)
    for name in ("qa/benchmark", "benchmark", "benchmark_8b"):
        (folder / name).mkdir()
        (folder / name / "tuned.yaml").write_text(f"{FIRST_LINE}a test\nextends: hf/generate\nmodel_dir: my_model\n")
    for name in ("tools", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "configuration.md", folder / "docs")
    lines = {
        "my_data/train.jsonl": {"input": "wake me", "output": "07:00"},
        "my_data/test.jsonl": {"input": "wake me", "output": "07:00"},
        "prompts.jsonl": {"prompt": {"user": "wake me"}},
        "my.jsonl": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        "yahma/alpaca-cleaned/train.json": {"instruction": "wake me", "input": "", "output": "07:00"},
        "tatsu-lab/alpaca/train.json": {"instruction": "wake me", "input": "", "output": "07:00", "text": "07:00"},
    }
    for name, line in lines.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{json.dumps(line)}\n" * (8 if "data" in name or "prompts" in name else 216))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.chdir(folder)
        yield folder


@pytest.mark.parametrize("line", TUNE_RUN)
def test_command_is_valid_as_written(line, workplace, layerskip, monkeypatch):
    monkeypatch.chdir(workplace)
    words, short = TUNE_RUN[line]
    place = words.index("--config")
    status, out, err = layerskip("validate", *words[place + 1 :], *short)
    assert status == 0, err
    assert f"`tune run {words[place - 1].replace('serve', 'generate')}`" in out  # a server takes generation configs


@pytest.mark.parametrize("name", examples())
def test_yaml_example_is_valid(name, workplace, layerskip, monkeypatch):
    monkeypatch.chdir(workplace)
    status, _, err = layerskip("validate", name)
    assert status == 0, err


@pytest.fixture(scope="module")
def run(workplace):
    """Runs a line of TO_BE_RUN or of a config's header in its short form, once."""
    trainings = [words for words, _ in TO_BE_RUN.values() if "layerskip_finetune" in words]
    for name in MADE:  # now the commands make them
        if name == "qa" or any(f"output_dir={name}" in words for words in trainings):
            shutil.rmtree(workplace / name)

    @cache
    def run(line: str):
        words, short = (TO_BE_RUN | header_commands())[line]
        if words[0] == "python":
            return run_command(str(workplace / words[1]), *words[2:], *short, cwd=workplace, timeout=900)
        if words[:2] == ["tune", "run"]:
            place = words.index("--config")
            cfg = load_config(words[place + 1], words[place + 2 :])
            if "model_dir" not in cfg and "quickstart/" not in line:
                short = [*BUILT, *(ADAMW if "optimizer" in cfg else []), *short]
            short = [*SHORT[words[place - 1]], *short]
        if "--nproc_per_node" in words:
            place = words.index("--nproc_per_node")
            ranks = run_tune_on_ranks(*words[1:place], *words[place + 2 :], *short, cwd=workplace)
            return max(ranks, key=lambda rank: rank.returncode != 0)  # the one that failed, or any
        return run_command(*words, *short, cwd=workplace, timeout=900)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("line", [*TO_BE_RUN, *header_commands()])
def test_command_runs(line, run):
    """In the order of the pages: the quickstart's checkpoint and the files that are copied serve later commands."""
    done = run(line)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_commands_for_my_data_say_what_they_choose(run, workplace):
    """Training, generation, benchmark, and generation as the benchmark found it best."""
    lines = [line for line in TO_BE_RUN if " qa/" in line][:4]
    assert [run(line).returncode for line in lines] == [0, 0, 0, 0]
    training, generation, benchmark, _ = (run(line).stdout + run(line).stderr for line in lines)
    assert "Chosen for this model and machine: " in training and "draft.exit_layer=1" in training
    assert "Drafts: trained draft, " in generation or "the trained draft should not pay" in generation
    assert '"acceptance_rate"' in generation
    assert "written to qa/benchmark/tuned.yaml" in benchmark
    tuned = OmegaConf.load(workplace / "qa" / "benchmark" / "tuned.yaml")
    assert tuned.model_dir in (f"{workplace}/qa", f"{workplace}/qa/epoch_0")  # the draft's checkpoint, if it pays
