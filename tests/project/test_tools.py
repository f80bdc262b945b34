"""The scripts in tools/ run."""

import json
import os
from pathlib import Path

import pytest
from helpers import commands
from helpers.tools import load

# ---- training_cost.py ----


@pytest.mark.slow
def test_training_cost_compares_ours_with_torchtunes(monkeypatch, capsys):
    script, started = load("training_cost"), []

    def run(command, **kwargs):
        started.append(command)
        return commands.run_forks(commands.script(*command[1:]), Path.cwd(), [os.environ])[0]

    monkeypatch.setattr(script.subprocess, "run", run)
    options = ["--repeats", "1", "--steps", "1", "--batch", "1", "--seq-len", "16", "--prob", "0.5"]
    script.main(["quickstart/finetune", "model.num_layers=3", "--exits", "1", *options])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = report["figures"]
    assert len(started) == 6 and set(figures) == set(script.METHODS)
    assert all(row["seconds"] > 0 and row["peak_gb"] >= row["before_gb"] > 0 for row in figures.values())
    time = figures["ours, exits"]["seconds"] / figures["torchtune, exits"]["seconds"]
    assert report["ratios"]["exits / torchtune's exits, time"] == pytest.approx(time)
