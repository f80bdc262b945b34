"""Shared by tests of checkpoints and resume: settings that move with t, what a folder holds, and runs that go on."""

import shutil
from pathlib import Path

import torch
from helpers.configs import MODEL
from helpers.training import train
from safetensors.torch import load_file

COSINE = {
    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 3,
}
# Everything that moves with t or draws random numbers: order, dropouts, curriculum, learning rate.
MOVING = {
    "model": MODEL | {"attn_dropout": 0.1},
    "layer_dropout": {"prob": 0.5, "schedule": "exp"},
    "lr_scheduler": COSINE,
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2},
    "shuffle": True,
}
WEIGHTS = "model-00001-of-00001.safetensors"
FILES = {WEIGHTS, "config.json", "tokenizer.json", "recipe_state.pt"}
# In packs of 48 tokens: 12 packs or so.
SHORT_TEXTS = [f"x{n} = {n * 37}\n" * (1 + n % 5) for n in range(48)]


def checkpoints(out: Path) -> list[str]:
    """Their names, the oldest first."""
    folders = [path for path in out.iterdir() if path.name.startswith(("step_", "epoch_"))]
    return [path.name for path in sorted(folders, key=lambda path: (path / "recipe_state.pt").stat().st_mtime_ns)]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("model*.safetensors")
    return load_file(file)


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states have the same names and are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


def written(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def keep_only(out: Path, name: str, copy: Path) -> Path:
    """An output folder as it was after the checkpoint `name`."""
    shutil.copytree(out / name, copy / name)
    return copy


def resumed(path: Path, name: str, *overrides: str) -> Path:
    """The output folder of a run that goes on from the checkpoint `name` of a config's run."""
    again = keep_only(path.parent / "out", name, path.parent / f"from_{name}")
    train(path, f"output_dir={again}", "resume_from_checkpoint=true", *overrides)
    return again
