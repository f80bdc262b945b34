"""The report of a GPU, on the CPU: each step with tiny shapes; steps that fail, hang or are not reached."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import run_forks, script
from helpers.tools import ROOT, load

STEPS = load("gpu_report").STEPS

# ---- the runner, with a stand-in for the steps ----

STAND_IN = """
import json, sys, time
step, rows, *arguments = sys.argv[1:]
rate = {"median": 2.0, "min": 1.5, "max": 2500.0}
with open(rows, "a") as file:
    print(json.dumps({"step": step, "arguments": arguments, "rate": rate}), file=file)
if step == "tests":
    raise RuntimeError("a test failed")
if step == "decode_1b":
    time.sleep(60)
"""


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Runs the script with options; returns its exit status and what it printed."""
    script = load("gpu_report")
    (tmp_path / "steps.py").write_text(STAND_IN)
    monkeypatch.setattr(script, "PROGRAM", tmp_path / "steps.py")
    monkeypatch.chdir(tmp_path)

    def report(*options: str) -> tuple[int, str]:
        try:
            script.main(["--out", "out", "--device", "cpu", "--tiny", *options])
            status = 0
        except SystemExit as e:
            status = e.code
        return status, capsys.readouterr().out

    return report


def result(step: str) -> dict:
    return json.loads(Path(f"out/{step}.json").read_text())


@pytest.mark.slow
def test_a_step_that_fails_or_hangs_does_not_end_the_report(report):
    status, printed = report("--limit", "3", "--only", "environment", "tests", "decode_1b", "decode_8b")
    assert status == 1 and "decode_1b: timed out after 3 s" in printed
    outcomes = {step: result(step)["status"] for step in ("environment", "tests", "decode_1b", "decode_8b")}
    assert outcomes == {"environment": "done", "tests": "failed", "decode_1b": "timed out", "decode_8b": "done"}
    # What a step measured before its end is kept, and why it ended.
    assert all(result(step)["rows"][0]["step"] == step for step in outcomes)
    assert "RuntimeError: a test failed" in result("tests")["error"] and result("decode_8b")["error"] is None
    work = Path("out/work").resolve()
    assert result("environment")["rows"][0]["arguments"] == ["--device", "cpu", "--work", str(work), "--tiny"]
    page = Path("out/report.md").read_text()
    assert "RuntimeError: a test failed" in page and "| 2 (1.5 to 2500) |" in page
    assert page.count("Not run yet.") == len(STEPS) - 4 and f"- python: {sys.version.split()[0]}" in page


@pytest.mark.slow
def test_a_second_call_goes_on(report):
    """It runs what has no result or timed out; steps that failed only on demand."""
    report("--only", "environment")
    _, printed = report("--budget", "3", "--limit", "7", "--only", "decode_1b", "decode_8b")
    assert result("decode_1b")["status"] == "timed out" and result("decode_1b")["rows"]
    assert "too few for decode_8b: call again" in printed and not Path("out/decode_8b.json").exists()
    before = Path("out/environment.json").stat().st_mtime_ns
    status, printed = report("--limit", "3")
    assert status == 1 and "environment:" not in printed and "decode_1b: timed out" in printed
    assert Path("out/environment.json").stat().st_mtime_ns == before and result("decode_8b")["status"] == "done"
    assert {path.stem for path in Path("out").glob("*.json")} == set(STEPS)
    assert "Not run yet." not in Path("out/report.md").read_text()
    statuses = {line.split()[0]: line for line in report("--list")[1].splitlines()}
    assert [*statuses] == [*STEPS] and " failed " in statuses["tests"] and " done " in statuses["finetune"]
    assert "tests: failed" in report("--only", "tests")[1]


def test_each_estimate_stands_beside_its_measurement():
    """The value of the first text, by method; those that miss a row are left."""
    script = load("gpu_report")
    assert {row["verdict"] for row in script.verdicts({})} == {"not measured yet"}

    def row(method, median, **columns):
        return {"method": method, "ms a round": {"median": median, "min": 1, "max": 9}, "ms to read": 1.0, **columns}

    drafts = script.DRAFTS_1B
    rows = [row("baseline", 2.0), row(drafts, 2.6, **{"ms draft": 2.4}), row("baseline", 9.0), row("another", 1.0)]
    rows += [{"method": drafts, "CUDA graphs a round": 8.0}, row(f"{drafts}{script.ONE_GRAPH}", 1.3)]
    found = [(row["measured"], row["verdict"]) for row in script.verdicts({"decode_1b": {"rows": rows}})]
    of_1b = [500, 2, 5.2 / 2.6 * 1000, 2.6, 0.2, 8, 0.5]
    assert [value for value, _ in found] == [pytest.approx(value) for value in of_1b] + [None] * 5
    verdicts = ["does not hold", "holds", "holds", "does not hold", "does not hold", "holds", "holds"]
    assert [verdict for _, verdict in found] == verdicts + ["not measured yet"] * 5
    (left,) = script.verdicts({"decode_8b": {"rows": [row("baseline", 2.0)]}})[7:8]
    assert left["measured"] == 500


def test_the_steps_measure_what_the_estimates_name(monkeypatch):
    """The drafts by which rows are found, and all of it in the first ten minutes."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    report, steps = load("gpu_report"), load("gpu_steps")
    place = steps.Place(torch.device("cpu"), False, Path(), None, Path())
    assert [next(iter(steps.drafts(place, shape))) for shape in ("1b", "8b")] == [report.DRAFTS_1B, report.DRAFTS_8B]
    first = [*report.STEPS][:2]
    assert {estimate.step for estimate in report.ESTIMATES} == {*first}
    assert sum(report.STEPS[step].limit_s for step in first) < 600


# ---- the steps, tiny ----

EXPECTED = {
    "environment": ["bf16 TFLOP/s", "GB/s read", "identical output"],
    "tests": ["outcome", "tests"],
    "decode_1b": ["text", "method", "ms a round", "ms to read", "ms draft"],
    "drafts_1b": ["text", "method", "ms a round", "ms to read", "ms draft", "ms verify", "ms host", "speed-up at .7"],
    "batches": ["model", "rows", "ms a round"],
    "lossless": ["dtype", "outputs", "identical"],
    "train_1b": ["step without optimizer", "recipe", "tokens/s", "peak GiB", "MFU"],
    "train_8b": ["recipe", "tokens/s", "peak GiB", "MFU"],
}


@pytest.mark.slow
@pytest.mark.parametrize("step", EXPECTED)
def test_each_step_of_the_gpu_report_runs_on_a_cpu(step, tmp_path, tokenizer_folder):
    """It runs on a CPU, and measures what it should. What finetune does, test_readme.py runs from the pages."""
    shutil.copytree(tokenizer_folder, tmp_path / "work" / "small" / "tokenizer")  # training one takes half a minute
    rows, options = tmp_path / "rows", ["--device", "cpu", "--tiny", "--work", str(tmp_path / "work")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    (done,) = run_forks(script(ROOT / "tools" / "gpu_steps.py", step, rows, *options), tmp_path, [environment])
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert not [row for row in found if "failed" in row]
    assert {*EXPECTED[step]} <= {column for row in found for column in row}
    check = CHECKS.get(step)
    assert check is None or check(found), found


CHECKS = {
    "lossless": lambda rows: [row["identical"] for row in rows if row["dtype"] == "fp32"] == [2, 2],
    "train_8b": lambda rows: [row["recipe"] for row in rows] == ["hf/draft", "hf/lora", "hf/full"],
}
