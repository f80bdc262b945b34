"""What a training logs: every exit, and the config with versions."""

import re
import time
from importlib.metadata import version

import pytest
from helpers.resuming import resumed
from helpers.training import VALIDATION, losses, read_log, train
from omegaconf import OmegaConf

from layerskip_recipes.config.loading import load_config

pytestmark = pytest.mark.slow


def test_wandb_offline_has_every_exit_and_the_config(tmp_path, finetune, monkeypatch):
    """wandb for real, offline: the run's file holds the names and the config with versions."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    component = "torchtune.training.metric_logging.WandBLogger"
    logger = {"_component_": component, "project": "layerskip", "log_dir": str(tmp_path)}
    train(finetune(metric_logger=logger, dataset_val=VALIDATION))
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    kinds = ("loss", "val_loss", "val_perplexity", "val_agreement")
    names = {f"{kind}_exit_{e}" for kind in kinds for e in (1, 2, 3, 4)} | {"loss_final", "val_loss_final"}
    names |= {"layer_dropout_rate", "versions", "layerskip-recipes"}
    until = time.monotonic() + 60  # wandb's own process writes the file, and may still do so
    while (
        missing := {name for name in names if name.encode() not in record.read_bytes()}
    ) and time.monotonic() < until:
        time.sleep(0.1)
    assert not missing


def test_the_logged_config_trains_and_has_versions_and_a_line_the_exits_of_its_step(tmp_path, finetune):
    path = finetune(max_steps_per_epoch=3)
    train(path)
    file = tmp_path / "out" / "torchtune_config.yaml"
    assert train(file, f"output_dir={tmp_path}/again").step == 3
    logged = OmegaConf.to_container(OmegaConf.load(file))
    versions = logged.pop("versions")
    for name in ("layerskip-recipes", "torch", "torchtune", "torchao"):
        assert versions[name] == version(name)
    assert re.fullmatch(r"3\.\d+\.\d+.*", versions["python"])
    given = OmegaConf.to_container(load_config(str(path)))
    given["early_exit_loss"]["chunk_tokens"] = 512  # chosen for a CPU
    assert logged == given
    for step, exits in {1: [1, 3, 4], 2: [2, 4], 3: [1, 3, 4]}.items():  # rotational, every second one
        line = read_log(tmp_path / "out")[step]
        assert sorted(int(name.split("_")[2]) for name in line if name.startswith("loss_exit_")) == exits


def test_a_line_has_the_means_since_the_last_one(tmp_path, finetune):
    exits = {"curriculum": "rotational", "interval": 4, "scale": 0.5}
    path = finetune(early_exit_loss=exits, epochs=2, max_steps_per_epoch=4, save_every_n_steps=1)
    train(path, f"output_dir={tmp_path}/every")
    every = losses(tmp_path / "every")
    train(path, "log_every_n_steps=3")
    found = losses(tmp_path / "out")
    assert sorted(found) == [3, 6]
    for end, line in found.items():
        steps = [every[step] for step in range(end - 2, end + 1)]
        assert {name for step in steps for name in step} == set(line) and "loss_exit_2" in found[6]
        for name in (name for name in line if name.startswith("loss")):
            values = [step[name] for step in steps if name in step]
            assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-6), name
    assert losses(resumed(path, "step_5", "log_every_n_steps=3")) == {6: found[6]}
