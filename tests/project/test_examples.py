"""The scripts in examples/ run on something tiny."""

import json
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import make_checkpoint
from helpers.pages import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def start(monkeypatch, tmp_path, capsys) -> Callable[..., str]:
    """Runs a script in this process, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def start(name: str, *arguments: str, **constants: Any) -> str:
        script = runpy.run_path(str(EXAMPLES / name))
        script["main"].__globals__.update(constants)
        monkeypatch.setattr("sys.argv", [name, *arguments])
        script["main"]()
        return capsys.readouterr().out

    return start


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, tokenizer_folder) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("examples") / "model", tokenizer_folder))


def test_the_finetune_example_trains(start, tmp_path, tokenizer_folder):
    shutil.copytree(tokenizer_folder, tmp_path / "here" / "tokenizer")  # training one takes half a minute
    size = {"vocab_size": 300, "num_layers": 8, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 64}
    out = start("finetune.py", "--steps", "2", "--out", "here", SIZE=size)
    assert re.findall(r"^step \d", out, flags=re.M) == ["step 1", "step 2"] and "exit 8: " in out
    assert (tmp_path / "here" / "model.pt").is_file()


def test_the_generate_example_gives_the_same_tokens(start, tiny_model):
    out = start("generate.py", tiny_model, NEW_TOKENS=12)
    assert "same tokens: True" in out and re.search(r"\d+ rounds for 12 tokens", out)


def test_the_example_that_measures_exits_has_a_row_for_each(start, tiny_model):
    rows = start("measure_exits.py", "--samples", "2", tiny_model).splitlines()[-4:]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"] and rows[-1].endswith("1.00")


def test_text_to_sql_questions_have_the_values_of_their_query(start, tmp_path):
    """The sentence's values come before the query's examples, and no name is cut by a shorter one."""
    variables = [{"name": name, "example": "EECS"} for name in ("dept1", "dept10")]
    sentence = {"text": "any dept10 or dept1 ?", "question-split": "train", "variables": {"dept1": "MATH"}}
    query = {"sql": ['SELECT "dept1" , "dept10" ;', "unused"], "variables": variables, "sentences": [sentence]}
    (tmp_path / "advising.json").write_text(json.dumps([query]))
    assert "train.jsonl: 1 questions" in start("text_to_sql.py", "advising.json", "sql")
    line = json.loads((tmp_path / "sql" / "train.jsonl").read_text())
    assert line == {"input": "any EECS or MATH ?", "output": 'SELECT "MATH" , "EECS" ;'}
    assert (tmp_path / "sql" / "test.jsonl").read_text() == ""


def test_the_slurm_script_starts_torchrun_and_resumes(tmp_path):
    """The Slurm script starts torchrun as it should, and resumes when a job is started again after a checkpoint."""
    stand_ins = {
        "scontrol": "echo node1; echo node2",
        "srun": 'echo "$@"',
        "layerskip": "echo model: a; echo output_dir: out",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "123", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def srun(**environment: str) -> str:
        done = subprocess.run(
            ["bash", str(EXAMPLES / "train_on_several_nodes.sh"), "my.yaml", "batch_size=4"],
            cwd=tmp_path, capture_output=True, text=True, env=os.environ | job | path | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert srun() == (
        "--kill-on-bad-exit=1 tune run --nnodes 2 --nproc_per_node 8 --rdzv_id 123 --rdzv_backend c10d "
        "--rdzv_endpoint node1:20123 layerskip_finetune --config my.yaml resume_from_checkpoint=false batch_size=4"
    )
    assert "resume_from_checkpoint=false" in srun(SLURM_RESTART_COUNT="1")
    Path(tmp_path / "out" / "step_500").mkdir(parents=True)
    assert "resume_from_checkpoint=true" in srun(SLURM_RESTART_COUNT="1")
