"""The wheel: `tune run` finds the entry modules and the configs resolve, as in the editable install."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import run_tune
from helpers.configs import finetune_config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel installed in it; first on PYTHONPATH, it hides the editable install."""
    folder = tmp_path_factory.mktemp("installed")
    # A copy, as building leaves files beside the source and takes old ones for new.
    source = tmp_path_factory.mktemp("source")
    for name in ("layerskip_recipes", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), str(source)], check=True)
    return folder


def test_the_wheel_has_entry_modules_and_all_configs(installed):
    (record,) = installed.glob("layerskip_recipes-*.dist-info/RECORD")
    names = {row[0] for row in csv.reader(record.read_text().splitlines())}
    assert {f"layerskip_{recipe}.py" for recipe in ("finetune", "generate", "eval", "benchmark", "serve")} <= names
    configs = {p.relative_to(ROOT / "recipes").as_posix() for p in (ROOT / "recipes" / "configs").rglob("*.yaml")}
    assert {f"layerskip_recipes/{name}" for name in configs} <= names
    assert {"layerskip_recipes/py.typed", "layerskip_recipes/custom_generate/requirements.txt"} <= names
    # Each module of the package, or a new folder is missing in pyproject.toml.
    sources = [p for ending in ("*.py", "*.cpp", "*.yaml") for p in (ROOT / "layerskip_recipes").rglob(ending)]
    assert {p.relative_to(ROOT).as_posix() for p in sources} <= names
    assert not any(name.startswith(("recipes/", "tests/", "tools/", "examples/")) for name in names)


def test_the_wheel_names_its_license_and_torchtune(installed):
    (metadata,) = installed.glob("layerskip_recipes-*.dist-info/METADATA")
    head = metadata.read_text(encoding="utf-8").partition("\n\n")[0]
    assert "License-Expression: BSD-3-Clause" in head and "Requires-Dist: torchtune==0.6.1" in head
    assert (metadata.parent / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "[torch." not in (metadata.parent / "entry_points.txt").read_text()  # torch runs none of our code


def test_the_wheel_trains_by_tune_run(installed, tmp_path, tokenizer_folder):
    env = {"PYTHONPATH": str(installed)}
    where = "from importlib.util import find_spec; print(find_spec('layerskip_recipes').origin)"
    shown = subprocess.run([sys.executable, "-c", where], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert Path(shown.stdout.strip()) == installed / "layerskip_recipes" / "__init__.py"
    changes = {"extends": "quickstart/finetune", "lr_scheduler": None, "early_exit_loss": {"exits": ":"}}
    path = finetune_config(tmp_path, tokenizer_folder, **changes)
    run = run_tune("run", "layerskip_finetune", "--config", str(path), env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "out" / "epoch_0" / "config.json").is_file()
