"""The scripts in docs/ run, on something tiny and uncompiled: what they measure is their readers' business."""

import runpy
from pathlib import Path

import pytest
from helpers.configs import benchmark_config, make_checkpoint

from layerskip_recipes.generation.kernels import compiling

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling takes a minute; every other line is the same."""
    monkeypatch.setattr(compiling, "_compiled", lambda function, *_: function)


def test_intermediate_verification(tmp_path, tokenizer_folder, monkeypatch, capsys):
    config = benchmark_config(tmp_path, make_checkpoint(tmp_path / "model", tokenizer_folder))
    monkeypatch.setattr("sys.argv", ["intermediate_verification.py", str(config), "max_new_tokens=12"])
    runpy.run_path(str(DOCS / "intermediate_verification.py"), run_name="__main__")
    cost, one, two = capsys.readouterr().out.strip().splitlines()[-3:]
    assert cost.startswith("cost of positions: 1: 1.00, 2: ")
    assert one.startswith("one stage: ") and two.startswith("two stages: ")


def test_long_contexts(monkeypatch, capsys):
    script = runpy.run_path(str(DOCS / "long_contexts.py"))
    monkeypatch.setitem(script["main"].__globals__, "NEW", 6)
    script["main"]([8, 16])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("text before") and [row.split()[0] for row in rows] == ["8", "16"]
