"""The configs hf/* on tiny random models of transformers: train, generate, evaluate, tune; what layerskip.json says."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers.hf_folders import model_with_tokenizer
from helpers.json_lines import write_lines
from helpers.recipes import run_eval, run_generate
from helpers.training import note_good_draft, train

from layerskip_recipes import LLM
from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.tuner import write_config
from layerskip_recipes.checkpoint.export import export
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.planner import DraftPlanner
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.training.early_exit import EarlyExitLoss

pytestmark = pytest.mark.slow

DATA = (
    "dataset={_component_: layerskip_recipes.quickstart.StdlibDataset, split: heldout, seq_len: 32, max_samples: 8}",
    "device=cpu",
)
TRAINING = (*DATA, "batch_size=2", "gradient_accumulation_steps=1")  # 4 steps


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer_folder) -> dict[str, Path]:
    """A Qwen3 and a Llama."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: model_with_tokenizer(kind, folder / kind, tokenizer_folder) for kind in ("qwen3", "llama")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, models) -> Path:
    """The folder of a run of hf/full on the Llama."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train("hf/full", f"model_dir={models['llama']}", f"output_dir={out}", *TRAINING)
    note_good_drafts(out / "epoch_0")
    return out


def noted(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "layerskip.json").read_text())


def note_good_drafts(checkpoint: Path) -> None:
    """The acceptance that a long training would have measured: generation drafts only where that pays."""
    description = noted(checkpoint)
    for by_vocabulary in description["measured"]["exits"].values():
        by_vocabulary["all"] = {key: [1.0 + 0.95 * d for d in range(1, 9)] for key in ("greedy", "sampled")}
    (checkpoint / "layerskip.json").write_text(json.dumps(description))


def how_trained(checkpoint: Path) -> dict:
    """What a checkpoint notes, without what it counted and measured."""
    return {key: value for key, value in noted(checkpoint).items() if key not in ("vocabulary", "measured")}


def test_a_checkpoint_notes_how_it_was_trained(trained, models):
    """One exit is trained, at a seventh of the depth."""
    assert [*noted(trained / "epoch_0")["measured"]["exits"]] == ["1"]
    assert how_trained(trained / "epoch_0") == {
        "num_layers": 8,
        "exits": [1, 8],
        "curriculum": None,
        "interval": None,
        "scale": 1.0,
        "scale_fn": "uniform",
        "layer_dropout": None,
        "steps": 4,
        "base": models["llama"].name,  # no path of this machine
    }


def generated(*settings: str) -> dict:
    """The report of a generation of 8 tokens."""
    return run_generate("hf/generate", "prompt=def main(", "max_new_tokens=8", *settings)[1]


def test_generation_drafts_from_a_trained_exit_of_the_newest_checkpoint(trained):
    report = generated(f"model_dir={trained}", "benchmark.compare=true", "device=cpu")
    assert (report["exit_layer"], report["tokens"], report["identical"]) == (1, 8, True)
    assert report["drafted"] > 0


def test_a_draft_for_a_frozen_model_drafts(models, tmp_path, caplog):
    """Trained on answers that the model wrote first; a generation says what the model says without it."""
    model = [f"model_dir={models['qwen3']}", "device=cpu"]
    asked, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    write_lines(asked, ({"prompt": {"user": f"say {i}"}} for i in range(8)))
    files = [f"prompt_file={asked}", f"output_file={answers}"]
    generated(*model, *files, "batch_size=8", "temperature=0.7", "seed=1")
    dataset = f"_component_: layerskip_recipes.tasks.qa_dataset, path: {answers}, question: prompt, answer: text"
    train("hf/draft", *model, f"output_dir={tmp_path}", *TRAINING, f"dataset={{{dataset}}}")
    draft = [f"self_speculation.draft={tmp_path}/epoch_0", "self_speculation.num_speculations=3"]
    report = generated(*model, "benchmark.compare=true", *draft)
    assert "without drafts" not in caplog.text
    assert (report["exit_layer"], report["identical"]) == (2, True) and report["drafted"] > 0


def test_generation_takes_the_draft_beside_its_model(models, tmp_path):
    """Generation takes it from the model's folder, and answers as without drafts."""
    train("hf/task", f"model_dir={models['qwen3']}", f"output_dir={tmp_path}", *TRAINING)
    assert noted(tmp_path / "epoch_0")["exits"] == [8]
    described = noted(tmp_path / "epoch_0" / "draft")
    assert (described["kind"], described["exit_layer"]) == ("copy", 1)
    note_good_draft(tmp_path / "epoch_0" / "draft")
    report = generated(f"model_dir={tmp_path}", "benchmark.compare=true", "device=cpu")
    assert report["identical"] is True and report["drafted"] > 0


def test_two_commands_train_a_draft_and_leave_the_model_alone(models, tmp_path, monkeypatch):
    """Two commands, of which the first leaves the model alone. Export, Python and the tuner find the draft as well."""
    monkeypatch.chdir(tmp_path)
    data(Path("my_data"), answers=True)
    before = {file: file.read_bytes() for file in models["llama"].iterdir()}
    train("qa/draft", f"model_dir={models['llama']}", "data_dir=my_data", "device=cpu")
    assert before == {file: file.read_bytes() for file in models["llama"].iterdir()}
    described = noted(Path("qa/epoch_0"))
    assert (described["kind"], described["exit_layer"], described["steps"]) == ("copy", 1, 2)
    assert described["measured"]["on"] == "dataset_val"
    note_good_draft(Path("qa/epoch_0"))

    recipe, report = run_generate("qa/generate", "data_dir=my_data", "max_new_tokens=8", "device=cpu")
    assert report["identical"] is True and report["drafted"] > 0 and recipe.plan.draft.folder == "qa/epoch_0"
    assert recipe.plan.answers.source == report["self_speculation"]["answers"] == "qa/epoch_0/answers.npz"
    assert LLM.load("qa").generate("say 1", 8, compile=False).stats.drafted > 0
    cfg = BenchmarkConfig.load(load_config("qa/benchmark", ["data_dir=my_data", "device=cpu"]))
    draft, _ = DraftPlanner.of_config(cfg, None).find_description(SelfSpeculation())
    assert draft.folder == "qa/epoch_0"
    write_config(tmp_path / "tuned.yaml", cfg, SelfSpeculation(draft=draft.folder), "fast")
    tuned = GenerateConfig.load(load_config("tuned.yaml", ["prompt=x"]))
    assert (tuned.model_dir, tuned.self_speculation.draft) == (f"{tmp_path}/qa", f"{tmp_path}/qa/epoch_0")
    run_eval("qa/eval", "data_dir=my_data", "device=cpu")
    assert Path("qa/exits.json").is_file()
    drafter = json.loads((export("qa", "exported", draft=0) / "config.json").read_text())
    assert drafter["num_hidden_layers"] == 1

    Path("moved").mkdir()
    shutil.copytree("qa/epoch_0", "moved/draft")
    described["base"]["folder"] = "/nowhere/model"
    Path("moved/draft/layerskip.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"'/nowhere/model'.*self_speculation\.draft"):
        generated("model_dir=moved/draft", "device=cpu")


def data(folder: Path, answers: bool) -> None:
    """Eight questions for training and for tests."""
    folder.mkdir()
    for name in ("train", "test"):
        lines = ({"input": f"say {i}"} | ({"output": f"<{i}>"} if answers else {}) for i in range(8))
        write_lines(folder / f"{name}.jsonl", lines)


@pytest.mark.parametrize("settings", [[], ["temperature=0.8", "seed=3", "batch_size=3"]], ids=["greedy", "sampled"])
def test_an_untrained_model_drafts_from_answers(settings, models, tmp_path):
    """Those of a JSONL file: here what the model says without drafts, and other answers."""
    asked, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    write_lines(asked, ({"prompt": {"user": f"say {i}"}} for i in range(3)))
    given = [f"model_dir={models['qwen3']}", "device=cpu", f"prompt_file={asked}", "max_new_tokens=24", *settings]
    generated(*given, f"output_file={answers}", "self_speculation=null")
    others = tmp_path / "others.jsonl"
    write_lines(others, ({"input": "say", "output": f"<{i}>"} for i in range(8)))
    others.write_text(others.read_text() + answers.read_text())
    found = tmp_path / "with_drafts.jsonl"
    report = generated(*given, f"output_file={found}", f"self_speculation.answers={others}")
    assert found.read_text() == answers.read_text()
    section = report["self_speculation"]
    assert (section["exit_layer"], section["answers"]) == (None, str(others)) and report["accepted"] > 0


@pytest.mark.parametrize("content", [None, ""], ids=["missing", "empty"])
def test_answers_that_cannot_be_read_end_a_run_before_its_weights_are_read(content, models, tmp_path, monkeypatch):
    monkeypatch.setattr(LLM, "of_config", lambda *args: pytest.fail("reads the weights"))
    answers = tmp_path / "train.jsonl"
    if content is not None:
        answers.write_text(content)
    with pytest.raises(ConfigError, match=r"^self_speculation.answers: .*train.jsonl"):
        generated(f"model_dir={models['qwen3']}", "device=cpu", f"self_speculation.answers={answers}")


def test_a_draft_is_not_trained_without_answers(models, tmp_path):
    data(tmp_path / "my_data", answers=False)
    given = [f"model_dir={models['llama']}", f"data_dir={tmp_path}/my_data", "device=cpu"]
    with pytest.raises(ConfigError) as e:
        train("qa/draft", *given, f"output_dir={tmp_path}/out")
    first, then = re.search(
        r"no field output, but input\..*--config (qa/answers) .*, and then (.*)$", str(e.value)
    ).groups()
    run_generate(first, *given, "max_new_tokens=8")
    train("qa/draft", *given, f"output_dir={tmp_path}/out", *then.split())
    assert noted(tmp_path / "out" / "epoch_0")["measured"]["on"] == "training"


def test_lora_checkpoints_are_models_and_adapters_alone_are_merged(models, tmp_path):
    settings = [f"model_dir={models['llama']}", f"output_dir={tmp_path}", *TRAINING, "max_steps_per_epoch=2"]
    train("hf/lora", *settings)
    note_good_drafts(tmp_path / "epoch_0")
    assert noted(tmp_path / "epoch_0")["exits"] == [1, 8]
    assert generated(f"model_dir={tmp_path}", "device=cpu")["exit_layer"] == 1
    shutil.rmtree(tmp_path / "epoch_0")
    train("hf/lora", *settings, "save_adapter_weights_only=true")
    assert generated(f"model_dir={tmp_path}", "device=cpu")["tokens"] == 8


def test_each_checkpoint_notes_its_steps_and_the_exits_of_its_layers(models, tmp_path):
    settings = [f"model_dir={models['llama']}", f"output_dir={tmp_path}", *TRAINING, "save_every_n_steps=1"]
    train("hf/full", *settings, "early_exit_loss.exits=4,6", "epochs=1")
    assert how_trained(tmp_path / "step_3") | {"steps": 4} == how_trained(tmp_path / "epoch_0")
    assert noted(tmp_path / "epoch_0")["exits"] == [4, 6, 8]


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({"curriculum": "rotational", "interval": 3}, 1, [4, 6]),  # exit 1 has the weight 0
        ({"curriculum": "rotational", "interval": 3}, 2, [2, 4, 5, 6]),
        ({"curriculum": "rotational", "interval": 3}, 50, [2, 3, 4, 5, 6]),
        ({"curriculum": "gradual"}, 1, [6]),
        ({"curriculum": "gradual"}, 25, [4, 5, 6]),
        ({"curriculum": None, "exits": "2,4", "scale_fn": "uniform"}, 1, [2, 4, 6]),
        ({"curriculum": None, "scale": 0.0}, 9, [6]),
    ],
)
def test_the_trained_exits_are_those_that_the_curriculum_reached(settings, steps, expected):
    """Of 6 layers and 100 steps: a gradual curriculum adds an exit every 100 / 12 steps."""
    assert EarlyExitLoss(**settings).trained(6, steps, 100) == expected
