"""Checkpoints of a run and going on from them: which are there, whole after any kill, and exactly the run that never
stopped. Whole runs are the expected values; learning rates come from the schedule's formula.
"""

import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torchtune.training.checkpointing._checkpointer as torchtune_checkpointer
from helpers.commands import run_tune
from helpers.configs import HF_CONFIG, MODEL, finetune_config
from helpers.resuming import COSINE, checkpoints, final_weights
from helpers.training import losses, train
from torch.distributed.checkpoint import FileSystemWriter
from torchao.optim.subclass_8bit import OptimState8bit
from torchtune.utils import get_logger

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.data import standard_library as quickstart
from layerskip_recipes.training import checkpoints as run_checkpoints
from layerskip_recipes.training.checkpoints import Checkpoints
from layerskip_recipes.training.recipe import LayerSkipFinetune

# Children that die: forked from a process that has imported everything and has no threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["layerskip_recipes.training.recipe", "pytest"])

# Everything that moves with t or draws random numbers: order, dropouts, curriculum, learning rate.
MOVING = {
    "model": MODEL | {"attn_dropout": 0.1},
    "layer_dropout": {"prob": 0.5, "schedule": "exp"},
    "lr_scheduler": COSINE,
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2},
    "shuffle": True,
}
FILES = {"model-00001-of-00001.safetensors", "config.json", "tokenizer.json", "recipe_state.pt"}


def every_line(out: Path) -> list[tuple[int, dict[str, float]]]:
    """All lines of the log without the speed, also those of steps that were taken again."""
    lines = []
    for line in (out / "logs" / "log.txt").read_text().splitlines():
        step, _, rest = line.partition(" | ")
        pairs = (pair.rsplit(":", 1) for pair in rest.split())
        lines.append((int(step.split()[1]), {k: float(v) for k, v in pairs if "second" not in k}))
    return lines


def written(folder: Path) -> dict[Path, int]:
    """When each file was written; without the config, which a logger writes at the start of each run."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".yaml"}


def keep_only(out: Path, name: str, copy: Path) -> Path:
    """An output folder as it was after the checkpoint `name`."""
    shutil.copytree(out / name, copy / name)
    return copy


# ------------------------------------------------------------------------------------------------- names and numbers


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("keep", "names"),
    [
        (None, ["step_2", "step_4", "epoch_0", "step_6", "step_8", "epoch_1"]),
        (3, ["step_6", "step_8", "epoch_1"]),
        (1, ["epoch_1"]),
    ],
)
def test_which_checkpoints_are_there(keep, names, asynchronous, tmp_path, tokenizer_folder):
    """step_N after N steps of the whole run, epoch_N (from 0) at an epoch's end and not twice; the oldest go."""
    dataset = {
        "_component_": "layerskip_recipes.quickstart.StdlibDataset", "split": "heldout", "seq_len": 16,
        "max_samples": 10,
    }  # fmt: skip
    path = finetune_config(
        tmp_path, tokenizer_folder, dataset=dataset, epochs=2, max_steps_per_epoch=None, save_every_n_steps=2,
        keep_last_n_checkpoints=keep, enable_async_checkpointing=asynchronous,
    )  # fmt: skip
    train(path)
    out = tmp_path / "out"
    assert checkpoints(out) == names
    assert {path.name for path in out.iterdir()} == {*names, "logs", "torchtune_config.yaml"}
    for name in names:
        files = {path.name for path in (out / name).iterdir()}
        shards = asynchronous and name.startswith("step")
        assert {".metadata", "recipe_state.pt"} <= files if shards else files >= FILES
        step = torch.load(out / name / "recipe_state.pt", weights_only=True)["step"]
        assert step == {"epoch_0": 5, "epoch_1": 10}.get(name, int(name.split("_")[1]))


# ------------------------------------------------------------------------------------------------ the same run again


def packed(folder: Path) -> dict:
    """36 short texts in packs of 48 tokens: 12 packs or so."""
    texts = [{"text": f"x{n} = {n * 37}\n" * (1 + n % 5)} for n in range(48)]
    (folder / "texts.json").write_text(json.dumps(texts))
    return {
        "_component_": "torchtune.datasets.text_completion_dataset", "source": "json", "split": "train",
        "data_files": str(folder / "texts.json"), "column": "text", "packed": True,
    }  # fmt: skip


# So wide that some of its state is whole blocks of 8 bits.
EIGHT_BIT = {
    "model": MODEL | {"attn_dropout": 0.1, "intermediate_dim": 128},
    "optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-2},
}
RUNS = {
    "packed data, accumulation, gradual": {
        "packed": True, "gradient_accumulation_steps": 2, "clip_grad_norm": 1.0,
        "early_exit_loss": {"scale": 0.5, "curriculum": "gradual"},
    },
    "8-bit AdamW, rotational": EIGHT_BIT,
    "optimizer in backward": {"optimizer_in_bwd": True},
    "shards, accumulation": {"enable_async_checkpointing": True, "gradient_accumulation_steps": 2},
    "SGD without momentum": {"optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-2}},
    "shards, 8-bit AdamW": EIGHT_BIT | {"enable_async_checkpointing": True},
    "shards, SGD without momentum": {
        "enable_async_checkpointing": True, "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-2},
    },
    "a layer without a step": {"layer_dropout": {"prob": 1.0, "layers_scale": "step"}},
    "shards, a layer without a step": {
        "enable_async_checkpointing": True, "layer_dropout": {"prob": 1.0, "layers_scale": "step"},
    },
    "no seed given": {"seed": None},
    "shards, layers that step later": {
        "enable_async_checkpointing": True, "layer_dropout": {"prob": 0.8, "layers_scale": "uniform"}, "batch_size": 1,
    },
}  # fmt: skip
# From the middle of the first epoch, from its end and from the middle of the third: three runs from all of them, the
# others in turns from one; those in shards from shards, which an epoch's end has not.
POINTS = (("step_1", 1), ("epoch_0", 2), ("step_5", 5))
FROM_ALL = ("packed data, accumulation, gradual", "optimizer in backward", "shards, accumulation")


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_the_run_that_never_stopped(name, tmp_path, tokenizer_folder, eager):
    """Every loss and the weights. The learning rate of each step is the schedule's, also as a tensor (torchao)."""
    changes = MOVING | RUNS[name]
    overrides = []
    if changes.pop("packed", False):
        changes["dataset"], overrides = packed(tmp_path), ["tokenizer.max_seq_len=48"]
    path = finetune_config(tmp_path, tokenizer_folder, epochs=3, save_every_n_steps=1, **changes)
    recipe = train(path, *overrides)
    kinds = {type(value) for state in recipe.optimizers.all[0].state.values() for value in state.values()}
    assert (OptimState8bit in kinds) == ("8-bit" in name)
    out = tmp_path / "out"
    whole, end = losses(out), final_weights(out / "epoch_2")
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    for step, line in whole.items():
        warm, progress = (step - 1) / 3, (step - 4) / 3
        expected = 1e-2 * (warm if step <= 3 else 0.5 * (1 + math.cos(math.pi * progress)))
        assert line["lr"] == pytest.approx(expected, rel=1e-6)
    turn = list(RUNS).index(name) % 3
    for checkpoint, done in POINTS if name in FROM_ALL else POINTS[turn : turn + 1]:
        again = keep_only(out, checkpoint, tmp_path / checkpoint)
        recipe = train(path, *overrides, f"output_dir={again}", "resume_from_checkpoint=true")
        assert losses(again) == {step: whole[step] for step in range(done + 1, 7)}
        assert all(torch.equal(end[name], value) for name, value in final_weights(again / "epoch_2").items())
        assert recipe.step == 6


def test_more_epochs_go_on(tmp_path, tokenizer_folder):
    """A finished run of one epoch, resumed with three, is the run of three: nothing here depends on T."""
    path = finetune_config(tmp_path, tokenizer_folder, layer_dropout={"prob": 0.5}, shuffle=True)
    train(path, f"output_dir={tmp_path}/whole", "epochs=3")
    train(path)
    train(path, "epochs=3", "resume_from_checkpoint=true")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert checkpoints(tmp_path / "out") == ["epoch_0", "epoch_1", "epoch_2"]


def test_another_end_is_said(tmp_path, tokenizer_folder, caplog):
    """What follows t/T, as a gradual curriculum, goes another way then: allowed, and told once."""
    path = finetune_config(tmp_path, tokenizer_folder, early_exit_loss={"curriculum": "gradual"})
    train(path)
    for overrides, said in ((["epochs=2"], 1), (["epochs=2"], 0)):
        caplog.clear()
        with caplog.at_level("WARNING", logger=get_logger().name):
            train(path, "resume_from_checkpoint=true", *overrides)
        assert sum("ends at step 4 now, before at 2" in message for message in caplog.messages) == said


def test_a_finished_run_has_nothing_to_do(tmp_path, tokenizer_folder, caplog):
    path = finetune_config(tmp_path, tokenizer_folder)
    train(path)
    out = tmp_path / "out"
    before = written(out)
    with caplog.at_level("INFO", logger=get_logger().name):
        recipe = train(path, "resume_from_checkpoint=true")
    assert recipe.step == 2
    assert written(out) == before
    assert "All 2 steps are done; for more, set epochs higher." in caplog.messages


@pytest.mark.parametrize("scheduler", [None, COSINE], ids=["constant", "cosine"])
def test_another_learning_rate_counts(scheduler, tmp_path, tokenizer_folder):
    """It may change, and is what the recipe itself suggests after a loss that is not finite."""
    path = finetune_config(tmp_path, tokenizer_folder, epochs=2, lr_scheduler=scheduler)
    train(path)
    before = losses(tmp_path / "out")
    again = keep_only(tmp_path / "out", "epoch_0", tmp_path / "again")
    train(path, f"output_dir={again}", "resume_from_checkpoint=true", "optimizer.lr=1e-4")
    for step in (3, 4):
        assert losses(again)[step]["lr"] == pytest.approx(before[step]["lr"] / 10)


def test_another_learning_rate_counts_from_shards_of_an_8_bit_optimizer(tmp_path, tokenizer_folder):
    """Its learning rate is a tensor, into which shards are read."""
    path = finetune_config(
        tmp_path, tokenizer_folder, save_every_n_steps=1, enable_async_checkpointing=True,
        optimizer={"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3},
    )  # fmt: skip
    train(path)
    again = keep_only(tmp_path / "out", "step_1", tmp_path / "again")
    train(path, f"output_dir={again}", "resume_from_checkpoint=true", "optimizer.lr=1e-4")
    assert losses(again)[2]["lr"] == pytest.approx(1e-4)


class Counted(torch.optim.AdamW):
    """An optimizer that counts its steps."""

    steps = 0

    def step(self, closure=None):
        Counted.steps += 1
        return super().step(closure)


@pytest.mark.parametrize("in_backward", [False, True])
def test_reading_an_optimizers_state_is_its_own_business(in_backward, tmp_path, tokenizer_folder):
    """torch would step it once without gradients, and wants all of its state on one device; bitsandbytes pages it."""
    path = finetune_config(
        tmp_path, tokenizer_folder, epochs=2, optimizer_in_bwd=in_backward,
        optimizer={"_component_": "test_resume.Counted", "lr": 1e-2},
    )  # fmt: skip
    whole = train(path)
    before = losses(tmp_path / "out")
    again = keep_only(tmp_path / "out", "epoch_0", tmp_path / "again")
    Counted.steps = 0
    resumed = train(path, f"output_dir={again}", "resume_from_checkpoint=true")
    assert Counted.steps == 2 * len(resumed.optimizers.all)
    assert losses(again) == {step: before[step] for step in (3, 4)}
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tokenizer_folder) -> Path:
    """The config of a run that has a checkpoint to resume."""
    path = finetune_config(tmp_path_factory.mktemp("stopped"), tokenizer_folder, epochs=2)
    train(path, "epochs=1")
    return path


@pytest.mark.parametrize(
    ("overrides", "key", "was", "now"),
    [
        (["dataset.seq_len=32"], "dataset.seq_len", "64", "32"),
        (["dataset.max_samples=6"], "dataset.max_samples", "8", "6"),
        (["early_exit_loss.curriculum=gradual"], "early_exit_loss.curriculum", "'rotational'", "'gradual'"),
        (["early_exit_loss.interval=3"], "early_exit_loss.interval", "2", "3"),
        (["early_exit_loss=null"], "early_exit_loss", "'rotational'", "None"),
        (["layer_dropout.prob=0.3"], "layer_dropout.prob", "0.2", "0.3"),
        (["layer_dropout=null"], "layer_dropout", "{'prob': 0.2}", "None"),
        (["batch_size=1"], "batch_size x gradient_accumulation_steps x data-parallel ranks", "2", "1"),
        (["gradient_accumulation_steps=2"], "batch_size x gradient_accumulation_steps x data-parallel ranks", "2", "4"),
        (["max_steps_per_epoch=3"], "steps in an epoch", "2", "3"),
        (["shuffle=false"], "shuffle", "None", "False"),
        (["model.norm_eps=1e-4"], "model.norm_eps", "None", "0.0001"),
        (["optimizer_in_bwd=true"], "optimizer_in_bwd", "None", "True"),
        (["loss=torch.nn.CrossEntropyLoss"], "loss._component_", "CEWithChunkedOutputLoss", "CrossEntropyLoss"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_run_is_refused(overrides, key, was, now, stopped):
    """One ValueError that says what it was and what it is now; checkpoints and log stay as they were."""
    before = written(stopped.parent)
    with pytest.raises(ValueError) as caught:
        LayerSkipFinetune(load_config(str(stopped), ["resume_from_checkpoint=true", *overrides])).setup()
    message = " ".join(str(caught.value).split())
    assert message.startswith(f"resume_from_checkpoint: {key} was ")
    said_before, _, said_now = message.partition(" and is ")
    assert was in said_before and now in said_now.partition(" now. ")[0]
    assert message.endswith("set resume_from_checkpoint=false and another output_dir")
    assert written(stopped.parent) == before


def test_what_saves_memory_may_change(tmp_path, tokenizer_folder):
    """It is what a run needs that ended for want of it."""
    path = finetune_config(tmp_path, tokenizer_folder)
    train(path, "early_exit_loss.chunk_tokens=64")
    smaller = ["early_exit_loss.chunk_tokens=16", "loss.num_output_chunks=16"]
    assert train(path, "resume_from_checkpoint=true", "epochs=2", *smaller).step == 4


def test_a_refused_resume_leaves_the_runs_config(stopped):
    config = stopped.parent / "out" / "torchtune_config.yaml"
    before = config.read_text()
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: layer_dropout.prob was"):
        LayerSkipFinetune(load_config(str(stopped), ["resume_from_checkpoint=true", "layer_dropout.prob=0.7"])).setup()
    assert config.read_text() == before


def test_a_finished_run_leaves_no_folder_behind(tmp_path, tokenizer_folder):
    path = finetune_config(tmp_path, tokenizer_folder)
    train(path)
    train(path, "resume_from_checkpoint=true")
    assert not (tmp_path / "out" / ".incomplete").exists()


def test_a_resumed_run_that_threw_its_start_away_still_writes_whole_checkpoints(tmp_path, tokenizer_folder):
    path = finetune_config(tmp_path, tokenizer_folder, keep_last_n_checkpoints=1)
    train(path)
    train(path, "resume_from_checkpoint=true", "epochs=3")
    assert {file.name for file in (tmp_path / "out" / "epoch_2").iterdir()} >= FILES
    assert train(path, "resume_from_checkpoint=true", "epochs=4").step == 8


def test_shards_do_not_throw_away_the_config_of_the_next_whole_checkpoint(tmp_path, tokenizer_folder):
    """It is copied from the checkpoint that the run began with, which is older than all that are kept."""
    path = finetune_config(
        tmp_path, tokenizer_folder, keep_last_n_checkpoints=1, save_every_n_steps=1, enable_async_checkpointing=True
    )
    train(path, "max_steps_per_epoch=3")
    train(path, "max_steps_per_epoch=3", "resume_from_checkpoint=true", "epochs=2")
    out = tmp_path / "out"
    assert [state.parent.name for state in out.glob("*/recipe_state.pt")] == ["epoch_1"]
    assert {file.name for file in (out / "epoch_1").iterdir()} >= FILES


def test_a_new_run_throws_away_no_earlier_runs_checkpoints(stopped):
    with pytest.raises(
        ValueError, match=r"^keep_last_n_checkpoints: 1 would throw away .* epoch_0\. Allowed: another "
    ):
        LayerSkipFinetune(load_config(str(stopped), ["keep_last_n_checkpoints=1"]))


def test_a_run_does_not_begin_where_it_writes(stopped):
    """Its first checkpoint would take the place of what it began with."""
    out = stopped.parent / "out"
    section = "_component_: torchtune.training.FullModelHFCheckpointer, model_type: LLAMA3_2"
    files = f"checkpoint_dir: {out}/epoch_0, checkpoint_files: [model-00001-of-00001.safetensors]"
    overrides = [f"checkpointer={{{section}, {files}}}"]
    before = written(stopped.parent)
    with pytest.raises(ValueError, match=r"^output_dir: '.*' holds epoch_0, where this run begins .*output_dir=.*_2$"):
        LayerSkipFinetune(load_config(str(stopped), overrides))
    assert written(stopped.parent) == before


def test_a_seed_that_a_resumed_run_does_not_take_is_said(stopped, caplog):
    with caplog.at_level("WARNING", logger=get_logger().name):
        LayerSkipFinetune(load_config(str(stopped), ["resume_from_checkpoint=true", "seed=77"])).setup()
    assert [m for m in caplog.messages if m.startswith("seed: 77 changes nothing here")]


def test_another_optimizer_is_refused(stopped):
    overrides = ["resume_from_checkpoint=true", "optimizer={_component_: torch.optim.SGD, lr: 0.1}"]
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: optimizer\._component_ was '.*AdamW' and is '.*SGD'"
    ):
        LayerSkipFinetune(load_config(str(stopped), overrides)).setup()


def test_the_models_length_said_or_not_is_the_same_run(stopped):
    """Without a limit of the tokenizer's own, samples are cut at the model's length."""
    limit = [f"tokenizer.max_seq_len={MODEL['max_seq_len']}"]
    LayerSkipFinetune(load_config(str(stopped), ["resume_from_checkpoint=true", *limit])).setup()


def test_a_deeper_model_is_refused(stopped):
    hf_config = json.dumps(HF_CONFIG | {"num_hidden_layers": 5})
    overrides = ["resume_from_checkpoint=true", "model.num_layers=5", f"checkpointer.hf_config={hf_config}"]
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: model\.num_layers was 4 and is 5 now"):
        LayerSkipFinetune(load_config(str(stopped), overrides)).setup()


def test_a_checkpoint_of_another_recipe_is_refused(stopped, tmp_path):
    """torchtune's recipes write a recipe_state.pt too, of another form."""
    shutil.copytree(stopped.parent / "out", tmp_path / "out")
    torch.save({"epochs_run": 1, "seed": 0, "optimizer": {}}, next(tmp_path.rglob("recipe_state.pt")))
    cfg = load_config(str(stopped), ["resume_from_checkpoint=true", f"output_dir={tmp_path / 'out'}"])
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .* not written by .*checkpointer.checkpoint_dir="):
        LayerSkipFinetune(cfg).setup()


def test_another_run_is_refused_before_weights_are_read(stopped, monkeypatch):
    def load(self, *args, **kwargs):
        raise AssertionError("the weights are loaded before the mistake is found")

    monkeypatch.setattr(torchtune_checkpointer.FullModelHFCheckpointer, "load_checkpoint", load)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: shuffle"):
        LayerSkipFinetune(load_config(str(stopped), ["resume_from_checkpoint=true", "shuffle=false"])).setup()


def test_another_tokenizer_is_refused(tmp_path, tokenizer_folder):
    """As many samples as before, cut shorter."""
    dataset = packed(tmp_path) | {"packed": False}
    path = finetune_config(tmp_path, tokenizer_folder, dataset=dataset, epochs=2)
    train(path, "epochs=1")
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*tokenizer.* was .* and is 10 "):
        train(path, "resume_from_checkpoint=true", "tokenizer.max_seq_len=10")


def test_a_copied_run_goes_on_from_its_last_checkpoint(tmp_path, tokenizer_folder):
    path = finetune_config(tmp_path, tokenizer_folder, epochs=3, save_every_n_steps=1)
    train(path)
    copy = tmp_path / "copy"
    for name in sorted(checkpoints(tmp_path / "out")):  # epoch_2 before step_1
        shutil.copytree(tmp_path / "out" / name, copy / name, copy_function=shutil.copy)
    assert train(path, f"output_dir={copy}", "resume_from_checkpoint=true").checkpoints.resumed_from.name == "epoch_2"


def test_what_may_change_on_resume(stopped, tmp_path):
    """Logging, saving, clipping, and a batch made otherwise of as many samples."""
    again = keep_only(stopped.parent / "out", "epoch_0", tmp_path / "again")
    train(
        stopped, f"output_dir={again}", "resume_from_checkpoint=true", "batch_size=1", "gradient_accumulation_steps=2",
        "log_every_n_steps=2", "save_every_n_steps=1", "keep_last_n_checkpoints=2", "clip_grad_norm=1.0",
    )  # fmt: skip
    assert sorted(losses(again)) == [4]
    assert checkpoints(again) == ["step_3", "epoch_1"]


# ------------------------------------------------------------------------------------------------------------- kills


def run_and_die(path: str, overrides: list[str], texts: dict[str, str], call: int, note: str) -> None:
    """Train, and die by SIGKILL at the `call`-th step of writing checkpoints; a file that is written is left half.

    The name of what was interrupted goes to the file `note`. Runs in a process of its own.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    quickstart.stdlib_texts = lambda split: texts
    calls = itertools.count(1)

    def wrap(owner, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            within_shards = name == "save" and not isinstance(args[1], str | Path)
            if within_shards or next(calls) != call:
                return function(*args, **kwargs)
            if name in ("save", "save_file"):
                function(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            if name == "rmtree" and Path(args[0]).exists():
                for file in [file for file in Path(args[0]).rglob("*") if file.is_file()][::2]:
                    file.unlink()
            if name == "write_data":
                function(*args, **kwargs).wait()
            Path(note).write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, wrapped)

    for owner, name in (
        (os, "rename"), (shutil, "rmtree"), (torch, "save"), (torchtune_checkpointer, "save_file"),
        (FileSystemWriter, "write_data"), (FileSystemWriter, "finish"),
    ):  # fmt: skip
        wrap(owner, name)
    recipe = LayerSkipFinetune(load_config(path, overrides))
    recipe.setup()
    recipe.train()


def whole_checkpoints(out: Path) -> list[str]:
    """The names of the checkpoints, each of which must be whole."""
    for path in [path for path in out.iterdir() if path.name.startswith(("step_", "epoch_"))]:
        torch.load(path / "recipe_state.pt", weights_only=True)
        if (path / ".metadata").exists():
            assert (path / "__0_0.distcp").stat().st_size > 0
        else:
            assert {file.name for file in path.iterdir()} >= FILES
            final_weights(path)
    return checkpoints(out)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["whole", "shards"])
def test_a_kill_at_each_point_of_writing_a_checkpoint(asynchronous, tmp_path, tokenizer_folder, few_texts):
    """Run after run, each killed one call later than the one before; all of them together are the whole run."""
    path = finetune_config(
        tmp_path, tokenizer_folder, epochs=4, max_steps_per_epoch=4, save_every_n_steps=1, keep_last_n_checkpoints=2,
        enable_async_checkpointing=asynchronous, **MOVING,
    )  # fmt: skip
    train(path, f"output_dir={tmp_path}/whole")
    whole, out, interrupted = losses(tmp_path / "whole"), tmp_path / "out", []
    out.mkdir()
    for call in range(1, 11):  # there are six to eight calls for each checkpoint
        resume = f"resume_from_checkpoint={'true' if whole_checkpoints(out) else 'false'}"
        note = tmp_path / "note"
        child = FORKS.Process(target=run_and_die, args=(str(path), [resume], few_texts, call, str(note)))
        child.start()
        child.join(600)
        assert child.exitcode == -signal.SIGKILL
        interrupted.append(note.read_text())
        assert len(whole_checkpoints(out)) <= 3  # a third one just before the oldest goes
    assert {"rename", "rmtree", "save"} <= set(interrupted)
    assert ({"write_data", "finish"} if asynchronous else {"save_file"}) <= set(interrupted)
    newest = checkpoints(out)[-1]
    assert train(path, "resume_from_checkpoint=true").checkpoints.resumed_from.name == newest != "epoch_3"
    lines = every_line(out)
    assert {step for step, _ in lines} == set(whole) and len(lines) > len(whole)
    for step, line in lines:
        assert line == whole[step]
    assert checkpoints(out) == ["step_15", "epoch_3"] and not (out / ".incomplete").exists()
    end = final_weights(tmp_path / "whole" / "epoch_3")
    assert all(torch.equal(end[name], value) for name, value in final_weights(out / "epoch_3").items())


def kill_when(path: Path, overrides: list[str], moment) -> None:
    """Start the real `tune run` and kill it when `moment()` is true."""
    tune = str(Path(sys.executable).with_name("tune"))
    command = [tune, "run", "layerskip_finetune", "--config", str(path), *overrides]
    process = subprocess.Popen(command, cwd=path.parent, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not moment():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_tune_run_killed_at_any_moment(tmp_path, tokenizer_folder):
    """Three times: in the middle of a save, then at random; packed data, accumulation, gradual, as a user has it."""
    path = finetune_config(
        tmp_path, tokenizer_folder, dataset=packed(tmp_path), gradient_accumulation_steps=2,
        early_exit_loss={"scale": 0.5, "curriculum": "gradual"}, epochs=10, max_steps_per_epoch=None,
        save_every_n_steps=2, **MOVING,
    )  # fmt: skip
    length = "tokenizer.max_seq_len=48"
    train(path, length, f"output_dir={tmp_path}/whole")
    whole, out = losses(tmp_path / "whole"), tmp_path / "out"
    out.mkdir()
    chance = random.Random(0)
    for kill in range(3):
        before = checkpoints(out)
        # Not before this run has written a checkpoint of its own.
        wait = chance.uniform(0, 0.1)

        def moment(before=before, wait=wait, kill=kill) -> bool:
            if len({path.name for path in out.glob("*_*[0-9]")} - set(before)) < 1:
                return False
            if kill == 0:
                return (out / ".incomplete").exists()
            time.sleep(wait)
            return True

        kill_when(path, [length, f"resume_from_checkpoint={'true' if before else 'false'}"], moment)
        assert whole_checkpoints(out)
    newest = out / checkpoints(out)[-1]
    done = torch.load(newest / "recipe_state.pt", weights_only=True)["step"]
    command = ["run", "layerskip_finetune", "--config", str(path), length, "resume_from_checkpoint=true"]
    run = run_tune(*command, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"Resumed from {newest}: {done} of {len(whole)} steps done." in run.stderr
    lines = every_line(out)
    assert {step for step, _ in lines} == set(whole)
    for step, line in lines:
        assert line == whole[step]
    assert not (out / ".incomplete").exists() and whole_checkpoints(out)[-1] == "epoch_9"


def test_a_clock_that_goes_back(tmp_path, tokenizer_folder, monkeypatch):
    """As from one machine to another: the last checkpoint stays the newest, and is what is kept."""
    path = finetune_config(tmp_path, tokenizer_folder, epochs=2, save_every_n_steps=1, keep_last_n_checkpoints=2)
    clock = itertools.count(1e9, -100.0)
    monkeypatch.setattr(run_checkpoints.time, "time", lambda: next(clock))
    train(path)
    left = [folder.name for folder in run_checkpoints.complete_checkpoints(tmp_path / "out")]
    assert left == ["step_3", "epoch_1"]


def test_dropout_of_attention_goes_on_too(tmp_path, tokenizer_folder):
    """It draws from torch's own generator, whose state is a part of the run."""
    model = MODEL | {"attn_dropout": 0.5}
    path = finetune_config(tmp_path, tokenizer_folder, model=model, max_steps_per_epoch=4, save_every_n_steps=1)
    train(path)
    out = tmp_path / "out"
    whole = losses(out)
    again = keep_only(out, "step_2", tmp_path / "again")
    torch.manual_seed(99)
    train(path, f"output_dir={again}", "resume_from_checkpoint=true")
    assert losses(again) == {step: whole[step] for step in (3, 4)}


def test_shards_are_of_their_step(tmp_path, tokenizer_folder, monkeypatch):
    """What is written in the background is no memory that the next step changes."""
    path = finetune_config(tmp_path, tokenizer_folder, save_every_n_steps=1, enable_async_checkpointing=True)
    given, write = [], dcp.async_save
    monkeypatch.setattr(dcp, "async_save", lambda shards, **kwargs: (given.append(shards), write(shards, **kwargs))[1])
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    recipe.train()
    own = {parameter.data_ptr() for parameter in recipe.model.parameters()}
    assert given and not any(value.data_ptr() in own for shards in given for value in shards["model"].values())
    recipe.cleanup()


def test_shards_that_cannot_be_written_end_the_run(tmp_path, tokenizer_folder, monkeypatch):
    path = finetune_config(tmp_path, tokenizer_folder, save_every_n_steps=1, enable_async_checkpointing=True)

    def full(self, name, place=Checkpoints._place):
        if name == "step_1":
            raise OSError("No space left on device")
        place(self, name)

    monkeypatch.setattr(Checkpoints, "_place", full)
    with pytest.raises(OSError, match="No space left"):
        train(path)
