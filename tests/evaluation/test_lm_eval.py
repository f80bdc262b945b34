"""lm-eval's own command scores a checkpoint, and an exit that `layerskip export` cut out: an offline task."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import run_command
from helpers.configs import MODEL
from helpers.tiny import walk
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.training import FullModelHFCheckpointer
from transformers import AutoTokenizer

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "import os", "choices": ["path", "sys.argv", "return self"], "answer": 0},
    {"question": "def main(args):", "choices": ["pass", "yield None", "x"], "answer": 1},
    {"question": "class Queue:", "choices": ["def get(self)", "raise"], "answer": 1},
]


@pytest.fixture
def task(tmp_path) -> Path:
    """A folder with the multiple-choice task `tiny` over a small JSONL."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    keys = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(keys))
    return folder


def log_likelihood(model, context: list[int], answer: list[int], exit_layer: int | None) -> float:
    """log p(answer | context), by the layers one after the other."""
    tokens = torch.tensor([context + answer])
    with torch.no_grad():
        logits = walk(model, tokens, range(exit_layer or len(model.layers)))[0, len(context) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum().item()


@pytest.mark.slow
def test_lm_eval_scores_an_exit(tmp_path, checkpoint, task):
    """The likelihood of each choice is that of plain PyTorch: the first layers with norm and head."""
    exit_layer, folder = 2, tmp_path / "exit_2"
    done = run_command("layerskip", "export", str(checkpoint), "exit_2", "--draft", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    options = f"--model hf --model_args pretrained={folder} --tasks tiny --include_path {task} --device cpu"
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path)}
    written = ["--log_samples", "--output_path", "scores"]
    done = run_command("lm_eval", *options.split(), *written, cwd=tmp_path, env=offline)
    assert done.returncode == 0, done.stderr[-3000:]
    # The same by plain PyTorch.
    model, tokenizer = tune_config.instantiate(OmegaConf.create(MODEL)), AutoTokenizer.from_pretrained(checkpoint)
    reader = FullModelHFCheckpointer(str(checkpoint), ["model.safetensors"], "LLAMA3_2", str(tmp_path / "unused"))
    model.load_state_dict(reader.load_checkpoint()["model"])
    (samples,) = (tmp_path / "scores").rglob("samples_tiny_*.jsonl")
    found = {sample["doc_id"]: sample for sample in map(json.loads, samples.read_text().splitlines())}
    right = 0
    for number, doc in enumerate(QUESTIONS):
        context = tokenizer(doc["question"])["input_ids"]
        answers = [tokenizer(f"{doc['question']} {choice}")["input_ids"][len(context) :] for choice in doc["choices"]]
        scores = [log_likelihood(model, context, answer, exit_layer) for answer in answers]
        assert [float(score) for ((score, _),) in found[number]["resps"]] == pytest.approx(scores, abs=1e-3)
        right += scores.index(max(scores)) == doc["answer"]
    (results,) = (tmp_path / "scores").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["tiny"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
