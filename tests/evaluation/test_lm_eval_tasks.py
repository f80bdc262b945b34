"""lm-eval's tasks through `layerskip_eval`, offline: against plain PyTorch, and mistakes found before the weights."""

import builtins
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.configs import MODEL, eval_config, make_checkpoint
from helpers.plain_decoding import plain_score
from helpers.recipes import run_eval as evaluate
from helpers.training import few_texts  # noqa: F401
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.training import FullModelHFCheckpointer

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.data.tokenizer import hf_tokenizer
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.evaluation.recipe import LayerSkipEval

pytest.importorskip("lm_eval")
import lm_eval

from layerskip_recipes.evaluation import harness

pytestmark = pytest.mark.slow

DRAFTS = "self_speculation={exit_layer: 2, num_speculations: 3}"
QUESTIONS = [
    {"question": "import os", "choices": ["path", "sys.argv", "return self"], "answer": 0},
    {"question": "def main(args):", "choices": ["pass", "yield None", "x"], "answer": 1},
    {"question": "class Queue:", "choices": ["def get(self)", "raise"], "answer": 1},
    {"question": "for i in range(10):", "choices": ["print(i)", "break", "continue", "if i:"], "answer": 2},
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a multiple-choice task and one that generates, over a small JSONL; the hub is out of reach."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    text = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task, keys in {"tiny_choice": choice, "tiny_text": text}.items():
        common = {"test_split": "test", "doc_to_text": "{{question}}", **source(folder / "questions.jsonl")}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump({"task": task, **common, **keys}))
    return folder


def source(file: Path) -> dict:
    """The keys of a task that read a JSONL file."""
    arguments = {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")}
    return {"dataset_path": "json", "dataset_kwargs": arguments}


def config(tmp_path, checkpoint, folder, **changes):
    changes = {"dataset": None, "task_path": str(folder), "max_new_tokens": 8} | changes
    return eval_config(tmp_path, checkpoint, **changes)


@pytest.mark.parametrize("exit_layer", [None, 2])
def test_a_multiple_choice_task_by_hand(exit_layer, tmp_path, checkpoint, tasks, tokenizer_folder, capsys):
    """The accuracy is that of the likeliest choices by plain PyTorch; of each checkpoint its own."""
    other = make_checkpoint(tmp_path / "other", tokenizer_folder, seed=1)
    compare = {"other": {"checkpoint_dir": str(other)}}
    path = config(tmp_path, checkpoint, tasks, tasks=["tiny_choice"], compare=compare, limit=3)
    recipe, report = evaluate(path, f"exit_layer={'null' if exit_layer is None else exit_layer}", "report=report.json")
    model = tune_config.instantiate(OmegaConf.create(MODEL))

    def accuracy(state) -> float:
        model.load_state_dict(state)
        right = 0
        for doc in QUESTIONS[:3]:
            scores = []
            for choice in doc["choices"]:
                context = recipe.tokenizer.encode(doc["question"], add_eos=False)
                whole = recipe.tokenizer.encode(f"{doc['question']} {choice}", add_eos=False)
                scores.append(plain_score(model, context, whole[len(context) :], exit_layer)[0])
            right += scores.index(max(scores)) == doc["answer"]
        return right / 3

    assert report["compare_tasks"]["other"]["tiny_choice"]["acc"] == pytest.approx(accuracy(recipe.model.state_dict()))
    own = FullModelHFCheckpointer(str(checkpoint), ["model.safetensors"], "LLAMA3_2", str(tmp_path / "unused"))
    acc = accuracy(own.load_checkpoint()["model"])
    # The standard error of a mean of 0s and 1s, with n - 1.
    expected = {"acc": acc, "acc_stderr": (acc * (1 - acc) / 2) ** 0.5, "documents": 3}
    assert report["tasks"] == {"tiny_choice": pytest.approx(expected)}
    out = capsys.readouterr().out
    assert "|tiny_choice|" in out and json.loads(out.splitlines()[-1]) == report
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "exits" not in report and "batches" not in report


def test_a_generating_task_is_the_same_with_drafts(tmp_path, checkpoint, tasks, monkeypatch):
    """The report has speed and acceptance; test_harness.py has the texts by plain greedy decoding."""
    found = {}
    generate = harness.LayerSkipLM.generate_until

    def keep(lm, requests, *args):
        is_plain = lm.drafts.section is None
        found[is_plain] = [r.args[0] for r in requests], generate(lm, requests, *args)
        return found[is_plain][1]

    monkeypatch.setattr(harness.LayerSkipLM, "generate_until", keep)
    path = config(tmp_path, checkpoint, tasks, tasks=["tiny_text", "tiny_choice"], num_fewshot=1)
    (_, ours), (_, plain) = evaluate(path, DRAFTS), evaluate(path)
    assert found[True] == found[False]
    contexts, texts = found[True]
    assert len(contexts) == len(QUESTIONS) and any(texts)
    assert {context.count("\n\n") for context in contexts} == {1}  # the example and the question
    report = ours["tasks"]["tiny_text"]
    assert report["exact_match"] == plain["tasks"]["tiny_text"]["exact_match"]
    assert 0 <= report["acceptance_rate"] <= 1 and report["tokens_per_second"] > 0
    assert report["tokens"] == plain["tasks"]["tiny_text"]["tokens"] > 4
    assert "acceptance_rate" not in plain["tasks"]["tiny_text"]
    assert ours["tasks"]["tiny_choice"] == plain["tasks"]["tiny_choice"]


def test_tasks_beside_a_dataset_and_through_the_chat_template(tmp_path, checkpoint, tasks, monkeypatch):
    """The exits are measured too; the template wraps each question."""
    contexts = []
    score = harness.LayerSkipLM.loglikelihood

    def keep(lm, requests, *args):
        contexts.extend(r.args[0] for r in requests)
        return score(lm, requests, *args)

    monkeypatch.setattr(harness.LayerSkipLM, "loglikelihood", keep)
    path = eval_config(tmp_path, checkpoint, tasks=["tiny_choice"], task_path=[str(tasks)], limit=1)
    template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}"
    template += "{% if add_generation_prompt %}<me>{% endif %}"
    _, report = evaluate(path, "apply_chat_template=true", f"tokenizer.chat_template='{template}'", "max_batches=1")
    assert list(report["exits"]) == [1, 2, 3, 4] and report["batches"] == 1
    assert report["tasks"]["tiny_choice"]["documents"] == 1
    assert set(contexts) == {"<user>import os<me>"}


def test_a_template_that_rejects_a_prompt_is_one_line(tokenizer_folder):
    template = "{% if messages %}{{ raise_exception('no such role') }}{% endif %}"
    lm = SimpleNamespace(tokenizer=hf_tokenizer(str(tokenizer_folder), chat_template=template))
    with pytest.raises(ConfigError, match=r"^apply_chat_template: .* rejects a task's prompt \(no such role\)"):
        harness.LayerSkipLM.apply_chat_template(lm, [{"role": "user", "content": "?"}])


# ---- programs that the model writes ----


class CodeEval:
    """Stands in for the metric `code_eval`, which `evaluate` would download."""

    def compute(self, references, predictions, k):
        assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
        passed = []
        for test, candidates in zip(references, predictions, strict=True):
            for candidate in candidates:
                try:
                    exec(f"{candidate}\n{test}", {})
                    passed.append(1.0)
                except Exception:
                    passed.append(0.0)
        return {"pass@1": sum(passed) / len(passed)}, {}


@pytest.fixture
def humaneval(tasks, monkeypatch):
    """A task with lm-eval's own file for HumanEval, over problems of which the first cannot be solved."""
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setattr("evaluate.load", lambda name: CodeEval())
    check = {"test": "def check(f): pass\n", "entry_point": "f"}
    problems = [check | {"prompt": prompt} for prompt in ("x = '''", "def f(x): pass\n#", "f = 3  #")]
    file = tasks / "problems.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    keys = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml"),
        "task": "tiny_humaneval",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    }
    (tasks / "tiny_humaneval.yaml").write_text(yaml.safe_dump(keys | source(file)))
    return tasks


def test_humaneval_runs_what_the_model_writes_if_the_user_confirms(humaneval, tmp_path, checkpoint, monkeypatch):
    """Whatever continues a comment solves two of the problems. Refused before the metric is loaded."""
    path = config(tmp_path, checkpoint, humaneval, tasks=["tiny_humaneval"])
    with monkeypatch.context() as patched:
        patched.setattr("evaluate.load", lambda name: pytest.fail("the metric is loaded"))
        with pytest.raises(ValueError, match=r"^tasks: tiny_humaneval runs programs .* confirm_run_unsafe_code=true$"):
            LayerSkipEval(load_config(str(path))).setup()
        assert "HF_ALLOW_CODE_EVAL" not in os.environ
    report = evaluate(path, "confirm_run_unsafe_code=true")[1]["tasks"]["tiny_humaneval"]
    assert report["pass@1,create_test"] == pytest.approx(2 / 3)
    assert report["documents"] == 3 and report["tokens"] > 0


# ---- mistakes ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("tasks=[tiny_chioce]", r"tasks: 'tiny_chioce' is no task.*Nearest: tiny_choice"),
        ("tasks=tiny_choice", r"tasks: 'tiny_choice' is not allowed.*tasks=\[arc_easy\]"),
        ("tasks=[]", r"tasks: \[\] is not allowed"),
        ("task_path=[nowhere]", r"task_path: 'nowhere' is not a folder.*task_path=tasks"),
        ("exit_layer=5", r"exit_layer: 5 is not an exit of this model. Allowed: 1\.\.4"),
        (DRAFTS.replace("2", "5", 1), r"self_speculation.exit_layer: 5 .*1\.\.4"),
        (f"exit_layer=2; {DRAFTS}", r"exit_layer: 2 is set beside"),
        ("compare={a: {checkpoint_dir: x}}; self_speculation={draft: x}", r"self_speculation.draft: .* one checkpoint"),
        ("max_new_tokens=128", r"tasks: tiny_text generates up to 128 tokens.*max_seq_len 128"),
        ("tasks=null", r"task_path: '.*' needs tasks\. Set that, or task_path=null"),
        ("dataset=null; exits=1", r"exits: '?1'? needs dataset\. Set that, or exits=null"),
        ("tasks=null; task_path=null; max_new_tokens=auto", r"dataset: None, and tasks is None.*_component_.*tasks="),
        ("human_eval={file: x}", r"human_eval: .* is not honoured.*tasks=\[humaneval\] confirm_run_unsafe_code=true"),
    ],
)
def test_mistakes_are_found_before_the_weights(
    overrides, message, tmp_path, checkpoint, tasks, monkeypatch, no_weights
):
    index = harness.TaskManager  # lm-eval's own tasks take ten seconds to list
    monkeypatch.setattr(harness, "TaskManager", lambda include_path, **_: index(None, include_path, False))
    path = config(tmp_path, checkpoint, tasks, tasks=["tiny_text"])
    with pytest.raises(ValueError, match=message):
        LayerSkipEval(load_config(str(path), overrides.split("; "))).setup()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"generation_kwargs": {"until": ["."], "num_beams": 4}}, r"tiny_text, generation_kwargs: .*num_beams"),
        ({"generation_kwargs": {"until": ["."], "top_k": 0}}, r"tiny_text, generation_kwargs: top_k: 0"),
        ({"num_fewshot": 0}, r"num_fewshot: 2 is not for tiny_text"),
        ({"dataset_kwargs": {"data_files": "nowhere.jsonl"}}, r"tasks: tiny_text cannot be loaded: FileNotFoundError"),
        ({"unsafe_code": True}, r"tasks: tiny_text runs programs that the model writes"),
    ],
)
def test_what_a_task_file_asks_for(keys, message, tmp_path, checkpoint, tasks, no_weights):
    task = tasks / "tiny_text.yaml"
    task.write_text(yaml.safe_dump(yaml.safe_load(task.read_text()) | keys))
    path = config(tmp_path, checkpoint, tasks, tasks=["tiny_text"], num_fewshot=2)
    with pytest.raises(ValueError, match=message):
        LayerSkipEval(load_config(str(path))).setup()


def test_without_lm_eval(tmp_path, checkpoint, tasks, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "layerskip_recipes.evaluation" and "harness" in (args[2] or ()):
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    path = config(tmp_path, checkpoint, tasks, tasks=["tiny_text"])
    with pytest.raises(ValueError, match=re.escape('pip install "lm-eval>=0.4.12,<0.5"')):
        LayerSkipEval(load_config(str(path))).setup()
