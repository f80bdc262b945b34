"""Checkpoints are whole after a kill at any moment, and the run goes on as if it had never stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import dying_run, forks
from helpers.commands import run_tune
from helpers.configs import finetune_config
from helpers.resuming import FILES, MOVING, checkpoints, final_weights, packed
from helpers.training import losses, texts, train


def every_line(out: Path) -> list[tuple[int, dict[str, float]]]:
    """All lines of the log without the speed, also those of steps that were taken again."""
    lines = []
    for line in (out / "logs" / "log.txt").read_text().splitlines():
        step, _, rest = line.partition(" | ")
        pairs = (pair.rsplit(":", 1) for pair in rest.split())
        lines.append((int(step.split()[1]), {k: float(v) for k, v in pairs if "second" not in k}))
    return lines


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
def test_a_kill_at_each_point_of_writing_a_checkpoint(asynchronous, tmp_path, tokenizer_folder):
    """Run after run, each killed one call later than the one before; all of them together are the whole run."""
    path = finetune_config(
        tmp_path, tokenizer_folder, epochs=4, max_steps_per_epoch=4, save_every_n_steps=1, keep_last_n_checkpoints=2,
        enable_async_checkpointing=asynchronous, dataset=texts(tmp_path), **MOVING,
    )  # fmt: skip
    train(path, f"output_dir={tmp_path}/whole")
    whole, out, interrupted = losses(tmp_path / "whole"), tmp_path / "out", []
    out.mkdir()
    for call in range(1, 11):  # there are six to eight calls for each checkpoint
        resume = f"resume_from_checkpoint={'true' if whole_checkpoints(out) else 'false'}"
        (died,) = forks.run([dying_run.__file__, str(call), str(path), resume], tmp_path, [os.environ])
        assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
        interrupted.append(died.stdout)
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
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_tune_run_killed_in_the_middle_of_a_save(tmp_path, tokenizer_folder):
    """Packed data, accumulation, gradual, as a user has it."""
    path = finetune_config(
        tmp_path, tokenizer_folder, dataset=packed(tmp_path), gradient_accumulation_steps=2,
        early_exit_loss={"scale": 0.5, "curriculum": "gradual"}, epochs=4, max_steps_per_epoch=None,
        save_every_n_steps=2, **MOVING,
    )  # fmt: skip
    length = "tokenizer.max_seq_len=48"
    train(path, length, f"output_dir={tmp_path}/whole")
    whole, out = losses(tmp_path / "whole"), tmp_path / "out"
    out.mkdir()
    # The second save or a later one, so that there is a checkpoint.
    kill_when(path, [length], lambda: any(out.glob("*_*[0-9]")) and (out / ".incomplete").exists())
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
    assert not (out / ".incomplete").exists() and whole_checkpoints(out)[-1] == "epoch_3"
