"""Training on two processes (torchrun, gloo): the losses of one, checkpoints that any number of ranks resumes."""

from pathlib import Path

import pytest
from configs import finetune_config
from conftest import run_tune
from test_finetune import losses, train

COSINE = {
    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 2,
}
# 20 steps of 4 samples: as one process, or as two with 2 samples each.
STEPS = {"layer_dropout": None, "epochs": 4, "max_steps_per_epoch": 5, "clip_grad_norm": 1.0, "lr_scheduler": COSINE}
DATA = {
    "_component_": "layerskip_recipes.quickstart.StdlibDataset",
    "split": "heldout",
    "seq_len": 64,
    "max_samples": 20,
}


def train_on_two(path: Path, *overrides: str, processes: int = 2) -> str:
    """Run a config on two processes; what it printed."""
    command = ["run", "--nnodes", "1", "--nproc_per_node", str(processes), "layerskip_finetune", "--config", str(path)]
    run = run_tune(*command, *overrides, cwd=path.parent, env={"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout + run.stderr


def test_two_processes_have_the_losses_of_one(tmp_path, tokenizer_folder):
    path = finetune_config(tmp_path, tokenizer_folder, **STEPS, dataset=DATA)
    train(path, f"output_dir={tmp_path}/one", "batch_size=4")
    train_on_two(path, f"output_dir={tmp_path}/two", "batch_size=2")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    for step in one:
        assert two[step] == pytest.approx(one[step], abs=1e-5)
