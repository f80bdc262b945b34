"""Shared by tests: COSINE, FILES, MOVING, checkpoints, final_weights, keep_only, packed, written."""

import json
import shutil
from pathlib import Path

import torch
from helpers.configs import MODEL
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
FILES = {"model-00001-of-00001.safetensors", "config.json", "tokenizer.json", "recipe_state.pt"}


def checkpoints(out: Path) -> list[str]:
    """Their names, the oldest first."""
    folders = [path for path in out.iterdir() if path.name.startswith(("step_", "epoch_"))]
    return [path.name for path in sorted(folders, key=lambda path: (path / "recipe_state.pt").stat().st_mtime_ns)]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model-00001-of-00001.safetensors")


def written(folder: Path) -> dict[Path, int]:
    """When each file was written; without the config, which a logger writes at the start of each run."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".yaml"}


def keep_only(out: Path, name: str, copy: Path) -> Path:
    """An output folder as it was after the checkpoint `name`."""
    shutil.copytree(out / name, copy / name)
    return copy


def packed(folder: Path) -> dict:
    """36 short texts in packs of 48 tokens: 12 packs or so."""
    texts = [{"text": f"x{n} = {n * 37}\n" * (1 + n % 5)} for n in range(48)]
    (folder / "texts.json").write_text(json.dumps(texts))
    return {
        "_component_": "torchtune.datasets.text_completion_dataset", "source": "json", "split": "train",
        "data_files": str(folder / "texts.json"), "column": "text", "packed": True,
    }  # fmt: skip
