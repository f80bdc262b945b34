"""Shared by tests: COSINE, checkpoints, final_weights."""

from pathlib import Path

import torch
from helpers.training import eager, few_texts, losses, train  # noqa: F401
from safetensors.torch import load_file

COSINE = {
    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 3,
}


def checkpoints(out: Path) -> list[str]:
    """Their names, the oldest first."""
    folders = [path for path in out.iterdir() if path.name.startswith(("step_", "epoch_"))]
    return [path.name for path in sorted(folders, key=lambda path: (path / "recipe_state.pt").stat().st_mtime_ns)]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model-00001-of-00001.safetensors")
