"""Finds a model's folder: a path, a run of layerskip_finetune with its checkpoints, or a name on the hub."""

import json
import re
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download

from layerskip_recipes.config.paths import read_json
from layerskip_recipes.errors import ConfigError, first_line
from layerskip_recipes.model.run_folder import DRAFT_FILE, newest_intact

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$")
DOWNLOADED = ["*.json", "model*.safetensors", "draft/*.safetensors", "*.jinja", "*.model"]


def model_folder(path: str, key: str = "path") -> Path:
    """The folder of a model: a path, where ~ is allowed, or a name on the hub, which is downloaded.

    For a run of layerskip_finetune it is the newest intact checkpoint with weights; shards only serve to resume. `key`
    is the path's key in messages.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            kinds = ("config.json", DRAFT_FILE, "adapter_config.json")
            folder = next(filter(None, (newest_intact(folder, needs) for needs in kinds)), folder)
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            base = read_json(folder / "adapter_config.json", key).get("base_model_name_or_path")
            raise ConfigError(
                f"{key}: {str(folder)!r} holds adapters only. Allowed: their base model, with the model.lora settings "
                f"of the training; for example {key}={base} checkpointer.adapter_checkpoint={folder}"
            )
        return folder
    if not HUB_NAME.fullmatch(path) or folder.is_absolute():
        raise ConfigError(
            f"{key}: {path!r} is no folder. Allowed: a folder with config.json, the output folder of a finished "
            f"training, or a name on the hub; for example {key}=~/models/Qwen3-0.6B"
        )
    return _downloaded(path, key)


@cache
def _downloaded(name: str, key: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as e:  # the hub's errors are subclasses
        raise ConfigError(
            f"{key}: {name!r} is no local folder, and the download from the hub failed ({first_line(e)}). Allowed: a "
            "folder with config.json, or the output folder of a finished training; a gated model on the hub needs a "
            "token, see huggingface-cli login"
        ) from e


def without_code(name: str, content: bytes) -> bytes:
    """A file of a model folder. A config loses `auto_map`, which names code for transformers to run.

    Raises:
        ValueError: for a config that is no JSON.
    """
    if name.endswith("config.json"):
        config = json.loads(content)
        if isinstance(config, dict) and config.pop("auto_map", None) is not None:
            return json.dumps(config, indent=2).encode() + b"\n"
    return content
