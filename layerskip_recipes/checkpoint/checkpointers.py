"""Reads the `checkpointer` section, and builds our checkpointer or torchtune's from it."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torchtune import training
from torchtune.training.checkpointing._utils import FormattedCheckpointFiles

from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer, hf_checkpointer
from layerskip_recipes.checkpoint.torchtune_fixes import corrected
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.folders.model_folder import model_folder, named_folder
from layerskip_recipes.model.adapters import adapter_file

CHECKPOINTERS = (
    HFCheckpointer,
    training.FullModelHFCheckpointer,
    training.FullModelMetaCheckpointer,
    training.FullModelTorchTuneCheckpointer,
)
ModelType = Literal[tuple(training.ModelType.__members__)]  # type: ignore[valid-type]


def is_scratch(section: Component) -> bool:
    return section.target is scratch_checkpointer


def reads_hf_folder(section: Component) -> bool:
    return section.target is hf_checkpointer


def starts_from_scratch(section: Component) -> bool:
    return is_scratch(section) or not (reads_hf_folder(section) or checkpoint_files(section))


def weights_folder(section: Component) -> Path | None:
    """The folder with the weights or with PEFT's adapters; None for a model from scratch."""
    if reads_hf_folder(section):
        return model_folder(section.get("path"), weights=True)
    folder = section.get("checkpoint_dir")
    if folder is None:
        if checkpoint_files(section):
            raise ConfigError("checkpointer.checkpoint_dir: missing; the folder of checkpoint_files")
        return None
    if not Path(str(folder)).is_dir():
        raise ConfigError(
            f"checkpointer.checkpoint_dir: {folder!r} is no folder. Give the folder with the model's files"
        )
    return Path(folder)


def described_folder(section: Component) -> Path | None:
    """The folder that may have a layerskip.json: that of the adapters, of a draft, or else of the weights."""
    adapters = section.get("adapter_checkpoint")
    if adapters is not None:
        return adapter_file(str(adapters)).parent
    return named_folder(section.get("path")) if reads_hf_folder(section) else weights_folder(section)


def checkpoint_files(section: Component) -> list[str]:
    """The file names in a section for a torchtune checkpointer; expands {filename_format, max_filename}."""
    files = section.get("checkpoint_files")
    if files is None:
        return []
    try:
        if isinstance(files, Mapping):
            return FormattedCheckpointFiles.from_dict(dict(files)).build_checkpoint_filenames()
        if isinstance(files, list) and all(isinstance(name, str) for name in files):
            return files
    except ValueError:
        pass  # a pattern that torchtune refuses
    raise ConfigError(
        f"checkpointer.checkpoint_files: {files!r} is not allowed. Allowed: a list of names, or filename_format and "
        "max_filename; for example checkpointer.checkpoint_files=[model.safetensors]"
    )


def scratch_checkpointer(
    hf_config: Mapping[str, Any], model_type: str, output_dir: str, tokenizer_dir: str | None = None
) -> training.FullModelHFCheckpointer:
    """A checkpointer for training from scratch: reads no weights and writes Hugging Face checkpoints.

    Each checkpoint gets `hf_config` as config.json, and the tokenizer*.json of tokenizer_dir.
    """
    scratch = tempfile.TemporaryDirectory(prefix="layerskip-")
    (Path(scratch.name) / "config.json").write_text(json.dumps(dict(hf_config), indent=2))
    for file in Path(tokenizer_dir).glob("tokenizer*.json") if tokenizer_dir else ():
        shutil.copy(file, scratch.name)
    checkpointer = training.FullModelHFCheckpointer(
        checkpoint_dir=scratch.name, checkpoint_files=[], model_type=model_type, output_dir=output_dir
    )
    checkpointer.scratch = scratch  # keeps the folder alive until these files have been read
    return checkpointer


def reading_checkpointer(cfg: RecipeConfig) -> Any:
    """The checkpointer of a config that only reads weights."""
    section = {key: value for key, value in cfg.checkpointer.section.items() if key != "adapter_checkpoint"}
    with tempfile.TemporaryDirectory(prefix="layerskip-") as nowhere:  # torchtune's checkpointers create output_dir
        return build_checkpointer(Component(section, "checkpointer"), nowhere)


def build_checkpointer(section: Component, output_dir: str) -> Any:
    return corrected(section.build(output_dir=output_dir))
