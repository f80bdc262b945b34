"""The files of a trained draft: its weights, and `layerskip.json`, which says what it is and for which model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from layerskip_recipes.checkpoint.trained_exits import DESCRIPTION, write_description
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft, weights_hash

DRAFT_FILE = "draft.safetensors"
FORMAT = 2  # in 1 an adapter had x_E only


def describe(draft: Draft, base: Mapping[str, Any], steps: int, target: str) -> dict[str, Any]:
    """The content of layerskip.json, for a draft that learned `target` in so many optimizer steps.

    `base` is the model that it drafts for: its folder, checkpointer section, and a hash of its weights.
    """
    shape = {"kind": draft.kind, "exit_layer": draft.exit_layer, "num_layers": draft.num_layers}
    trained = {"target": target, "base": dict(base), "steps": steps, "vocabulary": draft.vocabulary}
    return {"format": FORMAT} | shape | trained


def write_draft(folder: Path, weights: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """Write a draft's files into a new folder."""
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / DRAFT_FILE)
    write_description(folder, description)


def read_description(folder: str, key: str) -> dict[str, Any]:
    """The content of a draft's layerskip.json; `key` names the folder in messages."""
    path = Path(folder)
    if not ((path / DESCRIPTION).is_file() and (path / DRAFT_FILE).is_file()):
        raise ConfigError(
            f"{key}: {folder!r} holds no draft ({DESCRIPTION} and {DRAFT_FILE}). Give a checkpoint of a training with "
            "a section draft, such as its epoch_0"
        )
    description = json.loads((path / DESCRIPTION).read_text())
    if description.get("format") != FORMAT:
        raise ConfigError(
            f"{key}: {folder!r} has format {description.get('format')!r}. Allowed: {FORMAT}; train it anew"
        )
    return description


def read_draft(folder: str, model: LayerSkipDecoder, key: str) -> Draft:
    """A trained draft for this model, which has its weights, in eval mode; `key` names the folder in messages."""
    description = read_description(folder, key)
    base = description["base"]
    if base["hash"] != weights_hash(model.state_dict()):
        raise ConfigError(
            f"{key}: {folder!r} drafts for {base['folder']!r}, whose weights are not those of this model. "
            "Allowed: a draft of this model, or the model that it was trained for"
        )
    draft = Draft(model, description["kind"], description["exit_layer"], description["num_layers"])
    draft.load_state_dict(load_file(Path(folder) / DRAFT_FILE))
    return draft.requires_grad_(False).eval()
