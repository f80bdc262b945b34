"""Checkpoints are whole after a kill at any moment, and the run goes on as if it had never stopped."""

import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torchtune.training.checkpointing._checkpointer as torchtune_checkpointer
from helpers.commands import run_forks
from helpers.resuming import FILES, MOVING, checkpoints, final_weights, same_tensors
from helpers.training import log_lines, losses, texts, train
from torch.distributed.checkpoint import FileSystemWriter

from layerskip_recipes.cli.recipes import finetune as finetune_command

WRITING = (
    (os, "rename"), (shutil, "rmtree"), (torch, "save"), (torchtune_checkpointer, "save_file"),
    (FileSystemWriter, "write_data"), (FileSystemWriter, "finish"),
)  # fmt: skip


def die_at(call: int) -> None:
    """Wrap the functions that write checkpoints, so that the process ends by SIGKILL at their `call`-th call.

    The file that is written is left half. The name of the function is all that the process prints.
    """
    calls, stdout = itertools.count(1), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

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
            os.write(stdout, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, wrapped)

    for owner, name in WRITING:
        wrap(owner, name)


def signal_after(checkpoint: Path, number: int) -> None:
    while not checkpoint.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), number)


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


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["whole", "shards"])
def test_a_kill_while_writing_leaves_whole_checkpoints_from_which_the_run_goes_on(asynchronous, tmp_path, finetune):
    path = finetune(
        epochs=4, max_steps_per_epoch=4, save_every_n_steps=1, keep_last_n_checkpoints=2,
        enable_async_checkpointing=asynchronous, dataset=texts(tmp_path), **MOVING,
    )  # fmt: skip
    train(path, f"output_dir={tmp_path}/whole")
    whole, out, interrupted = losses(tmp_path / "whole"), tmp_path / "out", []
    out.mkdir()
    for call in range(1, 11):  # there are six to eight calls for each checkpoint
        resume = f"resume_from_checkpoint={'true' if whole_checkpoints(out) else 'false'}"

        def dying_run(call=call, resume=resume):
            die_at(call)
            train(path, resume)

        (died,) = run_forks(dying_run, tmp_path, [os.environ])
        assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
        interrupted.append(died.stdout)
        assert len(whole_checkpoints(out)) <= 3  # a third one just before the oldest goes
    assert {"rename", "rmtree", "save"} <= set(interrupted)
    assert ({"write_data", "finish"} if asynchronous else {"save_file"}) <= set(interrupted)
    newest = checkpoints(out)[-1]
    assert train(path, "resume_from_checkpoint=true").checkpoints.resumed_from.name == newest != "epoch_3"
    lines = log_lines(out)  # also those of steps that were taken again
    assert {step for step, _ in lines} == set(whole) and len(lines) > len(whole)
    for step, line in lines:
        assert {k: v for k, v in line.items() if "second" not in k} == whole[step]
    assert checkpoints(out) == ["step_15", "epoch_3"] and not (out / ".incomplete").exists()
    assert same_tensors(*(final_weights(folder / "epoch_3") for folder in (tmp_path / "whole", out)))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_leave_a_checkpoint_and_say_where_to_go_on(number, status, tmp_path, finetune):
    """No temporary files stay."""
    path, out = finetune(epochs=10000), tmp_path / "out"
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}

    def interrupted_run():
        tempfile.tempdir = None  # read it from the environment again
        threading.Thread(target=signal_after, args=(out / "epoch_0", number), daemon=True).start()
        sys.argv = ["layerskip_finetune", "--config", str(path)]
        finetune_command()

    (done,) = run_forks(interrupted_run, tmp_path, [environment])
    newest = checkpoints(out)[-1]
    assert done.returncode == status, done.stderr[-3000:]
    assert f"The last whole checkpoint is {out / newest}; go on from it with resume_from_checkpoint=true" in done.stderr
    assert not [*out.glob(".*")] and not [*(tmp_path / "temporary").glob("*layerskip*")]
