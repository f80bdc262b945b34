"""What a training logs: every exit, the config with versions and curriculum, in wandb and tensorboard."""

import json
import re
import time
from importlib.metadata import version

import pytest
from helpers.configs import finetune_config
from helpers.resuming import keep_only
from helpers.training import VALIDATION, losses, read_log, train, validated
from omegaconf import OmegaConf

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.training.early_exit import EarlyExitLoss

pytestmark = pytest.mark.slow

EXITS = (1, 2, 3, 4)


NAMES = {f"val_{what}_exit_{e}" for what in ("loss", "perplexity", "agreement") for e in EXITS} | {"val_loss_final"}


EVERY_EXIT = {f"loss_exit_{e}" for e in EXITS} | {"loss_final", "layer_dropout_rate"}


def test_wandb_offline_has_every_exit_and_the_config(tmp_path, tokenizer_folder, monkeypatch):
    """wandb for real, offline: the run's file holds the names and the config with versions and curriculum."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {
        "_component_": "torchtune.training.metric_logging.WandBLogger", "project": "layerskip",
        "log_dir": str(tmp_path),
    }  # fmt: skip
    train(finetune_config(tmp_path, tokenizer_folder, metric_logger=logger, dataset_val=VALIDATION))
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    names = {name.encode() for name in NAMES | EVERY_EXIT | {"versions", "layerskip-recipes", "curriculum"}}
    until = time.monotonic() + 60  # wandb's own process writes the file, and may still do so
    while (missing := {name for name in names if name not in record.read_bytes()}) and time.monotonic() < until:
        time.sleep(0.1)
    assert not missing


def test_tensorboard_has_every_exit(tmp_path, tokenizer_folder):
    """At the start, after step 2 and at the end, with the values that the disk logger has."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    component = "torchtune.training.metric_logging.TensorBoardLogger"
    path = finetune_config(
        tmp_path, tokenizer_folder, dataset_val=VALIDATION, run_val_every_n_steps=2, max_steps_per_epoch=3
    )
    train(path)
    logger = json.dumps({"_component_": component, "log_dir": str(tmp_path / "tb")})
    train(path, "~metric_logger.filename", f"metric_logger={logger}", f"output_dir={tmp_path}/other")
    (folder,) = (tmp_path / "tb").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["tensors"]) >= NAMES | {"loss", "loss_exit_4"}
    for step, line in validated(tmp_path / "out").items():
        for name, value in line.items():
            found = {e.step: e.tensor_proto.float_val[0] for e in events.Tensors(name)}
            assert sorted(found) == [0, 2, 3] and found[step] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "steps", "exits"),
    [
        ({"scale": 0.5, "curriculum": "rotational", "interval": 2}, 8, {"step 1": [1, 3, 4], "step 2": [2, 4]}),
        (
            {"scale": 0.5, "curriculum": "rotational", "interval": 3}, 8,
            {"step 1": [1, 4], "step 2": [2, 4], "step 3": [3, 4]},
        ),
        (
            # One layer more from the last down every T / (2 L) = 2 steps.
            {"scale": 0.5, "curriculum": "gradual"}, 16,
            {"step 1": [4], "step 3": [3, 4], "step 5": [2, 3, 4], "step 7": [1, 2, 3, 4]},
        ),
        ({"scale": 0.5, "curriculum": None, "layers": "0,2"}, 4, {"step 1": [1, 3, 4]}),
        (None, 4, {"step 1": [4]}),
    ],
    ids=["rotational 2", "rotational 3", "gradual", "all of some", "none"],
)  # fmt: skip
def test_the_logged_config_has_versions_and_curriculum(loss, steps, exits, tmp_path, tokenizer_folder):
    """Beside all that the config says; and the training's exits at each step are those."""
    path = finetune_config(tmp_path, tokenizer_folder, early_exit_loss=loss, max_steps_per_epoch=4, epochs=steps // 4)
    train(path)
    logged = OmegaConf.to_container(OmegaConf.load(tmp_path / "out" / "torchtune_config.yaml"))
    assert logged.pop("curriculum") == {"total_steps": steps, "num_layers": 4, "exits": exits}
    versions = logged.pop("versions")
    for name in ("layerskip-recipes", "torch", "torchtune", "torchao"):
        assert versions[name] == version(name)
    assert re.fullmatch(r"3\.\d+\.\d+.*", versions["python"])
    assert logged == OmegaConf.to_container(load_config(str(path)))
    on, sets = [], list(exits.values())
    for step, line in sorted(read_log(tmp_path / "out").items()):
        on = exits.get(f"step {step}", on)
        if loss and loss["curriculum"] == "rotational":
            on = sets[(step - 1) % len(sets)]
        assert sorted(int(name.split("_")[2]) for name in line if name.startswith("loss_exit_")) == on


def test_the_curriculum_of_a_long_gradual_run_is_logged_to_its_end():
    """Sets that appear late too, up to 16 of them: T = 800000 and L = 4 are 100000 steps a layer."""
    from layerskip_recipes.training.run_log import curriculum

    logged = curriculum(EarlyExitLoss(curriculum="gradual"), 4, 800_000)["exits"]
    assert logged == {
        "step 1": [4], "step 100001": [3, 4], "step 200001": [2, 3, 4], "step 300001": [1, 2, 3, 4],
    }  # fmt: skip


def test_a_line_has_the_means_since_the_last_one(tmp_path, tokenizer_folder):
    """Each exit's over the steps that trained it, also in a run that is resumed between two lines."""
    exits = {"curriculum": "rotational", "interval": 4, "scale": 0.5}
    path = finetune_config(
        tmp_path, tokenizer_folder, early_exit_loss=exits, epochs=2, max_steps_per_epoch=4, save_every_n_steps=1
    )
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
    again = keep_only(tmp_path / "out", "step_5", tmp_path / "again")
    train(path, f"output_dir={again}", "log_every_n_steps=3", "resume_from_checkpoint=true")
    assert losses(again) == {6: found[6]}
