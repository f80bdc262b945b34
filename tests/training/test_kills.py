"""Checkpoints are whole after a kill at any moment, and the run goes on as if it had never stopped."""

import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import dying_run, forks
from helpers.resuming import FILES, MOVING, checkpoints, final_weights, same_tensors
from helpers.training import log_lines, losses, texts, train


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
def test_a_kill_at_each_point_of_writing_a_checkpoint(asynchronous, tmp_path, finetune):
    path = finetune(
        epochs=4, max_steps_per_epoch=4, save_every_n_steps=1, keep_last_n_checkpoints=2,
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
    lines = log_lines(out)  # also those of steps that were taken again
    assert {step for step, _ in lines} == set(whole) and len(lines) > len(whole)
    for step, line in lines:
        assert {k: v for k, v in line.items() if "second" not in k} == whole[step]
    assert checkpoints(out) == ["step_15", "epoch_3"] and not (out / ".incomplete").exists()
    assert same_tensors(*(final_weights(folder / "epoch_3") for folder in (tmp_path / "whole", out)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_ctrl_c_and_sigterm(kind, status, tmp_path, finetune):
    """The last line says where to go on, and no temporary files stay."""
    path, out = finetune(epochs=10000), tmp_path / "out"
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    (done,) = forks.run([dying_run.__file__, kind, str(path)], tmp_path, [environment])
    newest = checkpoints(out)[-1]
    assert done.returncode == status, done.stderr[-3000:]
    assert f"The last whole checkpoint is {out / newest}; go on from it with resume_from_checkpoint=true" in done.stderr
    assert not [*out.glob(".*")] and not [*(tmp_path / "temporary").glob("*layerskip*")]
