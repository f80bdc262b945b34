"""The `checkpointer` section: its checks, and torchtune's checkpointers built from it."""

import inspect
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune import training, utils
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import TransformerDecoder
from torchtune.training.checkpointing._utils import FormattedCheckpointFiles

from layerskip_recipes.config.checks import check_choice, check_text
from layerskip_recipes.config.settings import build, check_device, check_dtype
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import ADAPTER_FILE, adapter_file, adapter_names
from layerskip_recipes.model.families import correct_names

log = utils.get_logger("INFO")
CHECKPOINTERS = (
    training.FullModelHFCheckpointer,
    training.FullModelMetaCheckpointer,
    training.FullModelTorchTuneCheckpointer,
)


def is_scratch(section: DictConfig) -> bool:
    """Whether a checkpointer section starts without weights by its component."""
    return _get_component_from_path(section._component_) is scratch_checkpointer


def checkpoint_files(section: DictConfig) -> list[str]:
    """The file names of a checkpointer section, its {filename_format, max_filename} form written out.

    Raises:
        ValueError: if it is neither a list of names nor that form.
    """
    files = section.get("checkpoint_files")
    if files is None:
        return []
    try:
        if isinstance(files, DictConfig):
            return FormattedCheckpointFiles.from_dict(OmegaConf.to_container(files)).build_checkpoint_filenames()
        if isinstance(files, ListConfig) and all(isinstance(name, str) for name in files):
            return list(files)
    except ValueError:
        pass
    raise ConfigError(
        f"checkpointer.checkpoint_files: {files!r} is not allowed. Allowed: a list of names, or filename_format and "
        "max_filename; for example checkpointer.checkpoint_files=[model.safetensors]"
    )


def check_checkpointer(cfg: DictConfig, model: TransformerDecoder, trains: bool = False) -> None:
    """Raises a ValueError if the checkpointer section is wrong in itself, or does not fit the model.

    Args:
        cfg: the config.
        model: of the config, on any device.
        trains: the recipe trains; otherwise it reads, and a model with adapters needs `adapter_checkpoint`.
    """
    section = cfg.checkpointer
    for key in ("recipe_checkpoint", *(("adapter_checkpoint",) if trains else ())):
        if section.get(key) is not None:
            raise ConfigError(
                f"checkpointer.{key}: {section[key]!r} is not honoured: resume_from_checkpoint=true finds the newest "
                f"checkpoint under output_dir by itself. Set checkpointer.{key}=null"
            )
    adapters = section.get("adapter_checkpoint")
    if adapters is not None:
        check_text("checkpointer.adapter_checkpoint", adapters, "${output_dir}/epoch_0")
    if not trains and bool(adapter_names(model)) != (adapters is not None):
        has = "adapters" if adapters is None else "no adapters"
        raise ConfigError(
            f"checkpointer.adapter_checkpoint: {adapters!r} does not fit the model of {cfg.model._component_}, which "
            f"has {has}. Allowed: a LoRA model and its adapters, such as "
            "checkpointer.adapter_checkpoint=${output_dir}/epoch_0, or neither"
        )
    for key in ("resume_from_checkpoint", "should_load_recipe_state"):
        if section.get(key):
            raise ConfigError(f"checkpointer.{key}: {section[key]!r} is not honoured here; set {key} at top level")
    component = _get_component_from_path(section._component_)
    if inspect.isclass(component) and not issubclass(component, CHECKPOINTERS):
        raise ConfigError(
            f"checkpointer._component_: {section._component_!r} is not allowed. Allowed: those of whole models, as "
            "torchtune.training.FullModelHFCheckpointer (to resume from shards: enable_async_checkpointing=true)"
        )
    if "model_type" in section:
        check_choice("checkpointer.model_type", section.model_type, training.ModelType.__members__)
    checkpoint_files(section)
    folder = section.get("checkpoint_dir")
    if folder is not None and not isinstance(folder, str):
        raise ConfigError(f"checkpointer.checkpoint_dir: {folder!r} is no path; for example /tmp/Llama-3.2-1B-Instruct")
    if not is_scratch(section):
        return
    if not isinstance(section.hf_config, DictConfig):
        raise ConfigError(f"checkpointer.hf_config: {section.hf_config!r} is no section; it is the model's config.json")
    built = {
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.layers[0].attn.num_kv_heads,
        "hidden_size": model.tok_embeddings.weight.shape[1],
        "vocab_size": model.tok_embeddings.weight.shape[0],
    }
    for key, value in built.items():
        if section.hf_config.get(key) != value:
            raise ConfigError(
                f"checkpointer.hf_config.{key}: {section.hf_config.get(key)!r} does not fit the model, which has "
                f"{value}"
            )


def check_checkpoint_files(cfg: DictConfig, writes: bool = False) -> None:
    """Raises a ValueError naming what `checkpointer.checkpoint_dir` lacks.

    Args:
        cfg: the config.
        writes: the recipe writes to output_dir, which torchtune wants outside of checkpoint_dir.
    """
    section = cfg.checkpointer
    folder = section.get("checkpoint_dir")
    if folder is None:
        if checkpoint_files(section):
            raise ConfigError("checkpointer.checkpoint_dir: missing; the folder of checkpoint_files")
        return
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"checkpointer.checkpoint_dir: {str(folder)!r} is no folder. Give the one with the model's files"
        )
    needed = checkpoint_files(section) + (["config.json"] if section._component_.endswith("HFCheckpointer") else [])
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        there = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        raise ConfigError(
            f"checkpointer.checkpoint_files: {', '.join(missing)} not in {str(folder)!r}. "
            f"There: {', '.join(there) or 'no weights'}"
        )
    adapters = section.get("adapter_checkpoint")
    if adapters is not None and (folder / ADAPTER_FILE).is_file() and folder.samefile(adapter_file(adapters).parent):
        raise ConfigError(
            f"checkpointer.adapter_checkpoint: {str(adapters)!r} lies beside the weights of checkpoint_dir, into "
            "which a LoRA training merged these adapters: they would count twice. Allowed: the base model's "
            "checkpoint_dir; or the model section without LoRA, and checkpointer.adapter_checkpoint=null"
        )
    if writes and Path(cfg.output_dir).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"output_dir: {cfg.output_dir!r} lies in checkpointer.checkpoint_dir; choose another folder")
    if writes and folder.resolve().parent == Path(cfg.output_dir).resolve():
        raise ConfigError(
            f"output_dir: {cfg.output_dir!r} holds {folder.name}, where this run begins and which its own checkpoints "
            f"may replace; choose another folder, for example output_dir={str(cfg.output_dir).rstrip('/')}_2"
        )


def check_output_dir(cfg: DictConfig) -> None:
    """Raises a ValueError if output_dir is no folder and cannot become one. Nothing is made here."""
    path = Path(cfg.output_dir).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output_dir: {cfg.output_dir!r} cannot be written, {str(existing)!r} is in the way")


def check_tokenizer_dir(cfg: DictConfig) -> None:
    """Raises a ValueError if checkpoints from scratch shall carry a tokenizer, and there is none."""
    folder = cfg.checkpointer.get("tokenizer_dir")
    if folder is not None and not list(Path(folder).glob("tokenizer*.json")):
        raise ConfigError(f"checkpointer.tokenizer_dir: {folder!r} has no tokenizer*.json; null copies none")


def require_weights(cfg: DictConfig) -> None:
    """Raises a ValueError if the checkpointer section names no weights: only training can start without."""
    if is_scratch(cfg.checkpointer) or not checkpoint_files(cfg.checkpointer):
        raise ConfigError("checkpointer.checkpoint_files: missing, the weights; for example [model.safetensors]")


def ready(cfg: DictConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a recipe that reads weights, after what only this machine can tell; sets the precision of
    matrix products.

    Raises:
        ValueError: for a device or dtype that is not here, or files that are missing.
    """
    device = check_device(cfg)
    dtype = check_dtype(cfg, device)
    check_checkpoint_files(cfg)
    require_weights(cfg)
    torch.set_float32_matmul_precision(cfg.get("float32_matmul_precision", "highest"))
    return device, dtype


def scratch_checkpointer(
    hf_config: Mapping[str, Any], model_type: str, output_dir: str, tokenizer_dir: str | None = None
) -> training.FullModelHFCheckpointer:
    """A checkpointer for training from scratch: no weights to read, Hugging Face checkpoints to write.

    Args:
        hf_config: the content of the checkpoints' config.json.
        model_type: torchtune's, such as LLAMA3_2; it chooses the names of the weights.
        output_dir: where checkpoints go.
        tokenizer_dir: a folder whose tokenizer*.json go into each checkpoint.

    Returns:
        torchtune's Hugging Face checkpointer.
    """
    scratch = tempfile.TemporaryDirectory(prefix="layerskip-")
    (Path(scratch.name) / "config.json").write_text(json.dumps(dict(hf_config), indent=2))
    for file in Path(tokenizer_dir).glob("tokenizer*.json") if tokenizer_dir else ():
        shutil.copy(file, scratch.name)
    checkpointer = training.FullModelHFCheckpointer(
        checkpoint_dir=scratch.name, checkpoint_files=[], model_type=model_type, output_dir=output_dir
    )
    checkpointer.scratch = scratch  # lives as long as the checkpointer copies from it
    return checkpointer


def reading_checkpointer(cfg: DictConfig) -> Any:
    """The checkpointer of a config, to read with: where it would write does not matter."""
    section = OmegaConf.create({key: value for key, value in cfg.checkpointer.items() if key != "adapter_checkpoint"})
    with tempfile.TemporaryDirectory(prefix="layerskip-") as nowhere:  # checkpointers make their output folder
        return build_checkpointer(section, nowhere)


def build_checkpointer(section: DictConfig, output_dir: str) -> Any:
    """torchtune's checkpointer of a section, its own output_dir replaced.

    Raises:
        ValueError: if the section is wrong.
    """
    correct_names()
    checkpointer = build(section, "checkpointer", output_dir=output_dir)
    # Llama 1 is older than grouped queries, and its config.json than their key, which torchtune reads.
    described = getattr(checkpointer, "_config", None) or {}
    if "num_attention_heads" in described:
        described.setdefault("num_key_value_heads", described["num_attention_heads"])
    return checkpointer


def warn_of_contradictions(checkpointer: Any, model: TransformerDecoder) -> None:
    """Say where the checkpoint's config.json has other numbers than the model that no weight shows."""
    described = getattr(checkpointer, "_config", None) or {}
    rope = described.get("rope_parameters")  # where transformers 5 writes it
    norm = getattr(model.norm, "rms_norm", model.norm)
    pairs = {
        "rope_theta": (described.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None),
                       "rope_base", getattr(model.layers[0].attn.pos_embeddings, "base", None)),
        "rms_norm_eps": (described.get("rms_norm_eps"), "norm_eps", getattr(norm, "eps", None)),
    }  # fmt: skip
    for name, (theirs, key, ours) in pairs.items():
        if isinstance(theirs, int | float) and isinstance(ours, int | float) and not math.isclose(theirs, ours):
            log.warning(
                "model.%s: it is %s here, and config.json beside the weights has %s %s; for example model.%s=%s",
                key, ours, name, theirs, key, theirs,
            )  # fmt: skip
