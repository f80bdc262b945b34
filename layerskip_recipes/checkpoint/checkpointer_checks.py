"""Checks of the `checkpointer` section: its keys, its files, and whether they fit the model."""

import inspect
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torchtune import utils
from torchtune.modules import TiedLinear, TransformerDecoder

from layerskip_recipes.checkpoint.checkpointers import (
    CHECKPOINTERS,
    ModelType,
    checkpoint_files,
    is_scratch,
    reads_hf_folder,
    starts_from_scratch,
    weights_folder,
)
from layerskip_recipes.checkpoint.hf_checkpointer import hf_checkpointer, weight_files, weights_found
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import PositiveInt, check
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_decoder import is_hf_decoder
from layerskip_recipes.folders.model_folder import base_folder
from layerskip_recipes.folders.run_folder import WRITTEN
from layerskip_recipes.model.adapters import ADAPTER_FILE, adapter_file, adapter_names

log = utils.get_logger("INFO")
ShardSize = Annotated[str, Field(pattern=r"^\d+ ?[KMGT]B$", examples=["5GB"])] | PositiveInt | None


def check_checkpointer(cfg: RecipeConfig, trains: bool = False) -> None:
    """Check the checkpointer section and that it fits the model. Training does not support `adapter_checkpoint`."""
    section, model = cfg.checkpointer, cfg.meta_model
    # Check the keys.
    ignored = ("recipe_checkpoint", "resume_from_checkpoint", "should_load_recipe_state")
    for key in (*ignored, "adapter_checkpoint") if trains else ignored:
        if section.get(key):
            raise ConfigError(
                f"checkpointer.{key}: {section.get(key)!r} is not honoured here: resume_from_checkpoint=true at top "
                f"level finds the newest checkpoint under output_dir by itself. Set checkpointer.{key}=null"
            )
    # Check that adapters and model belong together.
    adapters = section.get("adapter_checkpoint")
    if not trains and bool(adapter_names(model)) != (adapters is not None):
        model_has = "adapters" if adapters is None else "no adapters"
        raise ConfigError(
            f"checkpointer.adapter_checkpoint: {adapters!r} does not fit the model of {cfg.model.path}, which has "
            f"{model_has}. Allowed: a LoRA model and its adapters, such as "
            "checkpointer.adapter_checkpoint=${output_dir}/epoch_0, or neither"
        )
    # Check the class and the list of files.
    if inspect.isclass(section.target) and not issubclass(section.target, CHECKPOINTERS):
        raise ConfigError(
            f"checkpointer._component_: {section.path!r} is not allowed. Allowed: one for whole models, such as "
            "torchtune.training.FullModelHFCheckpointer (to resume from shards: enable_async_checkpointing=true)"
        )
    if "model_type" in section.arguments:
        check("checkpointer.model_type", section.get("model_type"), ModelType)
    check("checkpointer.shard_size", section.get("shard_size"), ShardSize)
    checkpoint_files(section)
    if reads_hf_folder(section) != is_hf_decoder(model):
        raise ConfigError(
            f"checkpointer._component_: {section.path} does not fit the model of {cfg.model.path}: they order "
            "attention weights differently. Allowed: layerskip_recipes.hf_checkpointer with "
            "layerskip_recipes.hf_decoder, or torchtune's checkpointers with torchtune's builders"
        )
    # Check that the config.json of checkpoints from scratch describes the model.
    if not is_scratch(section):
        return
    described = {"tie_word_embeddings": False, **section.get("hf_config")}
    built = {
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.layers[0].attn.num_kv_heads,
        "hidden_size": model.tok_embeddings.embedding_dim,
        "vocab_size": model.tok_embeddings.num_embeddings,
        "tie_word_embeddings": isinstance(model.output, TiedLinear),
    }
    for key, value in built.items():
        if described.get(key) != value:
            raise ConfigError(
                f"checkpointer.hf_config.{key}: {described.get(key)!r} does not fit the model, which has {value}"
            )


def check_checkpoint_files(cfg: RecipeConfig, writes: bool = False) -> None:
    """Check that the weights exist and, if the run `writes` checkpoints, that these damage none of them."""
    section = cfg.checkpointer
    # Check the files to read.
    folder = weights_folder(section)
    if folder is None:
        return
    if reads_hf_folder(section):
        weight_files(base_folder(folder, weights=True))
        hf_checkpointer(section.get("path"))  # checks adapters
    else:
        names = checkpoint_files(section) + (["config.json"] if section.path.endswith("HFCheckpointer") else [])
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"checkpointer.checkpoint_files: {', '.join(missing)} not in {str(folder)!r}. "
                f"There: {weights_found(folder)}"
            )
    adapters = section.get("adapter_checkpoint")
    if adapters is not None and (folder / ADAPTER_FILE).is_file() and folder.samefile(adapter_file(adapters).parent):
        raise ConfigError(
            f"checkpointer.adapter_checkpoint: {str(adapters)!r} is in checkpoint_dir, whose weights already "
            "contain these adapters: they would count twice. Allowed: the base model's checkpoint_dir; "
            "or the model section without LoRA, and checkpointer.adapter_checkpoint=null"
        )
    # Check that writing damages no input.
    output_dir, folder = Path(cfg.output_dir or "").resolve(), folder.resolve()
    if writes and (output_dir.is_relative_to(folder) or output_dir == folder.parent):
        is_run = output_dir == folder.parent or (folder / WRITTEN).exists()
        raise ConfigError(
            f"output_dir: {cfg.output_dir!r} lies in checkpointer.checkpoint_dir, or holds it, and this run's "
            f"checkpoints may replace its files; for example output_dir={folder.parent if is_run else folder}_2"
        )


def check_tokenizer_dir(section: Component) -> None:
    """Check that there is a tokenizer to copy into checkpoints from scratch."""
    folder = section.get("tokenizer_dir")
    if folder is not None and not list(Path(folder).glob("tokenizer*.json")):
        raise ConfigError(f"checkpointer.tokenizer_dir: {folder!r} has no tokenizer*.json. Allowed: null to copy none")


def prepare_device(cfg: RecipeConfig) -> torch.device:
    """Find the device of a recipe that does not train, check the files, and set the matmul precision."""
    device = cfg.find_device()
    check_checkpoint_files(cfg)
    if starts_from_scratch(cfg.checkpointer):
        raise ConfigError("checkpointer.checkpoint_files: missing, the weights; for example [model.safetensors]")
    torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    return device


def warn_of_contradictions(checkpointer: Any, model: TransformerDecoder) -> None:
    """Warn if config.json and the model differ in a number that the weights' shapes do not show."""
    described = getattr(checkpointer, "_config", None) or {}
    rope = described.get("rope_parameters")  # where transformers 5 writes it
    norm = getattr(model.norm, "rms_norm", model.norm)
    theta = described.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None)
    for name, theirs, key, ours in (
        ("rope_theta", theta, "rope_base", getattr(model.layers[0].attn.pos_embeddings, "base", None)),
        ("rms_norm_eps", described.get("rms_norm_eps"), "norm_eps", getattr(norm, "eps", None)),
    ):
        if isinstance(theirs, int | float) and isinstance(ours, int | float) and not math.isclose(theirs, ours):
            log.warning(
                "model.%s: it is %s here, but the checkpoint's config.json has %s %s; for example model.%s=%s",
                key, ours, name, theirs, key, theirs,
            )  # fmt: skip
