"""The files of a trained draft: its weights, and `layerskip.json`, which describes the draft and its base model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from safetensors.torch import load_file, save_file
from torchtune.utils import get_logger

from layerskip_recipes.acceptance.trained_exits import DESCRIPTION, Measured, Token, write_description
from layerskip_recipes.checkpoint.checkpointers import (
    CHECKPOINTERS,
    ModelType,
    checkpoint_files,
    described_folder,
    reads_hf_folder,
    weights_folder,
)
from layerskip_recipes.checkpoint.hf_checkpointer import readable
from layerskip_recipes.checkpoint.torchtune_fixes import corrected
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.paths import read_json
from layerskip_recipes.config.schema import PositiveInt, Section, Text
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.folders.run_folder import DRAFT_FILE
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft, Kind, weights_hash

log = get_logger("INFO")
DRAFT = "draft"  # in a model's folder, the folder of a draft that was trained beside it
BESIDE = ".."  # the folder of its base
FORMAT = 3
BY_NAME: dict[str, Any] = {checkpointer.__name__: checkpointer for checkpointer in CHECKPOINTERS}


class Base(Section):
    """The model that a draft was trained for. Users download this file with weights, so it must not name code."""

    folder: Text
    """A local folder, or a name on the hub; BESIDE: the folder above the draft's."""
    hash: Text
    """See `weights_hash`."""
    checkpointer: Literal[tuple(BY_NAME)] = "HFCheckpointer"  # type: ignore[valid-type]
    # For torchtune's checkpointers only:
    files: list[Text] | None = None
    model_type: ModelType | None = None  # type: ignore[valid-type]

    def build_checkpointer(self, output_dir: str) -> Any:
        arguments: dict[str, Any] = {}
        if self.checkpointer != "HFCheckpointer":
            arguments = {"checkpoint_files": self.files, "model_type": self.model_type}
        try:
            return corrected(BY_NAME[self.checkpointer](self.folder, output_dir=output_dir, **arguments))
        except (OSError, ValueError, KeyError) as e:
            raise ConfigError(f"{DESCRIPTION}: {self.checkpointer} cannot read its base {self.folder!r} ({e})") from e


class DraftDescription(Section):
    """The content of a draft's layerskip.json."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[FORMAT]  # type: ignore[valid-type]
    kind: Kind
    exit_layer: PositiveInt
    base: Base
    vocabulary: list[Token] | None = None
    """The tokens that the draft can predict; None: all."""
    measured: Measured | None = None
    folder: str = ""
    """Where it was read, as the user wrote it."""

    @property
    def num_layers(self) -> int:
        """The number of the draft's own layers."""
        return self.exit_layer if self.kind == "copy" else 1

    @property
    def model_layers(self) -> int:
        """The number of the model's first layers that run below the draft's own."""
        return 0 if self.kind == "copy" else self.exit_layer

    def is_for(self, checkpointer: Any) -> bool:
        """Whether a checkpointer class reads the base as it was read in training."""
        return _name_of(checkpointer) == self.base.checkpointer


def describe_base(section: Component, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Build the fields of `Base` from a checkpointer section and its weights."""
    folder = section.get("path") if reads_hf_folder(section) else section.get("checkpoint_dir")
    if Path(folder).is_dir():  # still valid from another working directory, and once a run there has gone on
        folder = str((weights_folder(section) or Path(folder)).absolute())
    base = {"folder": folder, "hash": weights_hash(weights)}
    base["checkpointer"] = _name_of(section.target)
    if not reads_hf_folder(section):
        base |= {"files": checkpoint_files(section), "model_type": section.get("model_type")}
    return base


def describe(draft: Draft, base: Mapping[str, Any], steps: int, measured: Any = None) -> dict[str, Any]:
    """Build a draft's layerskip.json; it was trained for `steps` optimizer steps."""
    shape = {"kind": draft.kind, "exit_layer": draft.exit_layer}
    trained = {"base": dict(base), "steps": steps, "vocabulary": draft.vocabulary}
    return {"format": FORMAT} | shape | trained | {"measured": measured}


def write_draft(folder: Path, weights: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / DRAFT_FILE)
    write_description(folder, description)


def own_draft(model: Path | None) -> str | None:
    """The folder of the draft that was trained beside the model of a folder, if any, or the folder itself if it is a
    draft's."""
    for folder in () if model is None else (model, model / DRAFT):
        if (folder / DRAFT_FILE).is_file():
            return str(folder)
    return None


def earlier_draft(
    section: Component, kind: Kind, exit_layer: int, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """The draft in a model's folder, if it has this form and was trained for these weights."""
    folder = own_draft(described_folder(section))
    if folder is None:
        return None
    try:
        described = read_description(folder, "checkpointer")
        draft_weights = load_file(readable(Path(folder) / DRAFT_FILE, "checkpointer"))
    except ConfigError as e:
        log.warning(f"The draft in {folder} is not trained further: {e}")
        return None
    fits = (described.kind, described.exit_layer, described.base.hash) == (kind, exit_layer, weights_hash(weights))
    return draft_weights if fits else None


def _name_of(checkpointer: Any) -> str:
    return next(name for name, known in BY_NAME.items() if issubclass(checkpointer, known))


def read_description(folder: str, key: str) -> DraftDescription:
    """Read the layerskip.json of a draft, or of the draft beside a model; errors name `key`."""
    path = Path(own_draft(Path(folder)) or folder)
    if not ((path / DESCRIPTION).is_file() and (path / DRAFT_FILE).is_file()):
        raise ConfigError(
            f"{key}: {folder!r} holds no draft ({DESCRIPTION} and {DRAFT_FILE}). Give a checkpoint of a draft "
            "training, such as its epoch_0"
        )
    described = DraftDescription.parse(read_json(path / DESCRIPTION, key), str(path / DESCRIPTION))
    base = described.base
    if base.folder == BESIDE:
        base = base.model_copy(update={"folder": str(path.absolute().parent)})
    return described.model_copy(update={"base": base, "folder": folder})


def read_draft(described: DraftDescription, model: LayerSkipDecoder, key: str, own_hash: str | None = None) -> Draft:
    """Load a trained draft for a model, in eval mode, on the model's device; errors name `key`.

    `own_hash` is that of the model's weights, for a model without weights on the meta device.
    """
    folder = own_draft(Path(described.folder)) or described.folder
    if described.base.hash != (own_hash or weights_hash(model.state_dict())):
        raise ConfigError(
            f"{key}: {folder!r} drafts for {described.base.folder!r}, whose weights are not those of this model. "
            "Allowed: a draft of this model, or the model that it was trained for. If the model beside it was "
            "replaced, delete the draft's folder"
        )
    weights = load_file(readable(Path(folder) / DRAFT_FILE, key))
    try:
        draft = Draft(model, described.kind, described.exit_layer)
        draft.load_state_dict(weights, assign=own_hash is not None)
    except (IndexError, RuntimeError) as e:
        what = f"{described.kind} at exit {described.exit_layer}"
        raise ConfigError(f"{key}: {DRAFT_FILE} in {folder!r} does not fit its {DESCRIPTION}, a {what}") from e
    draft.vocabulary = described.vocabulary
    return draft.requires_grad_(False).eval()
