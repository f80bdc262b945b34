"""Finds a model's folder: a path or hub name, the newest checkpoint of a run, the base of a draft or of adapters."""

import json
import re
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from layerskip_recipes.config.paths import read_json
from layerskip_recipes.errors import ConfigError, first_line
from layerskip_recipes.folders.run_folder import DRAFT_FILE, newest_intact

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$")
SMALL = ("*.json", "*.jinja", "*.model")  # all that a config and a tokenizer need
WEIGHTS = ("model*.safetensors", "draft*.safetensors", "adapter_model.safetensors")
CONFIG, ADAPTERS = "config.json", "adapter_config.json"
# Keys of adapter_config.json that have to be off: with them, adapters are more than W + s B A.
MORE_THAN_LORA = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "megatron_config", "monteclora_config", "arrow_config"),
    "kasa_config",
)
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base's weights


def named_folder(path: str, key: str = "path", weights: bool = False, revision: str | None = None) -> Path:
    """The folder that `path` names: a path, where ~ is allowed, or a name on the hub, which is downloaded.

    For a run of layerskip_finetune it is the newest intact checkpoint of a model, a draft or adapters; shards only
    serve to resume. `key` is the path's key in messages. Without `weights`, only the small files are downloaded.
    `revision` is a branch, tag or commit on the hub.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / CONFIG).is_file():
            return folder
        return next(filter(None, (newest_intact(folder, needs) for needs in (CONFIG, DRAFT_FILE, ADAPTERS))), folder)
    if not HUB_NAME.fullmatch(path) or folder.is_absolute():
        raise ConfigError(
            f"{key}: {path!r} is no folder. Allowed: a folder with config.json, the output folder of a finished "
            f"training, or a name on the hub; for example {key}=~/models/Qwen3-0.6B"
        )
    return _downloaded(path, key, (*SMALL, *WEIGHTS) if weights else SMALL, revision)


def model_folder(path: str, key: str = "path", weights: bool = False) -> Path:
    """The folder with a model's weights, or with adapters. A trained draft leads to the model that it drafts for."""
    folder = named_folder(path, key, weights)
    if (folder / CONFIG).is_file() or (folder / ADAPTERS).is_file():
        return folder
    base = read_json(folder / "layerskip.json", key, {}).get("base")  # it describes a trained draft
    if not isinstance(base, dict) or not isinstance(base.get("folder"), str):
        return folder
    if base.get("checkpointer", "HFCheckpointer") != "HFCheckpointer":
        raise ConfigError(
            f"{key}: {str(folder)!r} is a draft for a model that {base['checkpointer']} reads. Allowed: a draft for a "
            "model of hf_checkpointer. For this draft, use layerskip_generate with self_speculation.draft"
        )
    if base["folder"] == "..":
        return folder.absolute().parent
    what = f"the model that the draft in {str(folder)!r} was trained for"
    advice = f"For generation with a model elsewhere: {key}=MODEL self_speculation.draft={folder}"
    base_folder = _found(base["folder"], what, advice, key, weights)
    if not ((base_folder / CONFIG).is_file() or (base_folder / ADAPTERS).is_file()):
        raise ConfigError(f"{key}: {str(base_folder)!r} holds no model, and should hold {what}")
    return base_folder


def base_folder(folder: Path, key: str = "path", weights: bool = False) -> Path:
    """The folder with config.json for a `model_folder`: itself or, for adapters, that of their base model.

    Some programs write a config.json beside adapters, but no weights. The base lies where the adapters say, or in a
    folder of that name beside theirs. A base on the hub is downloaded in the adapters' revision of it.
    """
    if not holds_adapters(folder):
        return folder
    described = read_json(folder / ADAPTERS, key)
    _check_mergeable(described, folder, key)
    name = described.get("base_model_name_or_path")
    where = f"base_model_name_or_path in {str(folder / ADAPTERS)!r}"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{key}: {where} is {name!r}. Allowed: the base model's folder, or its name on the hub")
    beside = folder.absolute().parent / Path(name).name
    if not Path(name).expanduser().is_dir() and beside.is_dir():
        name = str(beside)
    find = partial(_found, name, where, "Write the base model's folder there", key, revision=described.get("revision"))
    base = find(weights=False)
    if holds_adapters(base):
        raise ConfigError(f"{key}: {where} names adapters, {str(base)!r}. Allowed: the folder of a whole model")
    if read_json(base / CONFIG, key).get("quantization_config"):
        raise ConfigError(
            f"{key}: {where} names a quantised model, {name!r}. Allowed: the model that it was made from, in 16 or 32 "
            "bits, by its folder or its name on the hub, which usually has no ending like -bnb-4bit"
        )
    return find(weights=weights)


def holds_adapters(folder: Path) -> bool:
    """Whether a folder has PEFT's adapters without a model's weights."""
    return (folder / ADAPTERS).is_file() and not any(folder.glob("model*.safetensors"))


def _check_mergeable(described: Mapping[str, Any], folder: Path, key: str) -> None:
    """Raise a ConfigError unless the adapters are LoRA that can be merged into the base's weights."""
    wrong = {name: described[name] for name in MORE_THAN_LORA if described.get(name)}
    if described.get("init_lora_weights") not in PLAIN_STARTS:
        wrong["init_lora_weights"] = described["init_lora_weights"]
    for name, only in (("peft_type", "LORA"), ("bias", "none")):
        if described.get(name, only) != only:
            wrong[name] = described[name]
    if wrong:
        raise ConfigError(
            f"{key}: the adapters in {str(folder)!r} cannot be merged while loading, because of "
            f"{', '.join(f'{name}: {value!r}' for name, value in wrong.items())}. Allowed: LoRA without these; or a "
            "whole model, which PEFT's merge_and_unload() makes"
        )


def _found(name: str, what: str, advice: str, key: str, weights: bool, revision: str | None = None) -> Path:
    """The folder that another folder's file names; messages say `what` it is, and give `advice`."""
    try:
        return named_folder(name, key, weights, revision)
    except ConfigError as e:
        version = f" in revision {revision!r}" if revision else ""
        raise ConfigError(
            f"{key}: {what}, {name!r}{version}, is neither a folder nor a model that can be downloaded. {advice}"
        ) from e


@cache
def _downloaded(name: str, key: str, patterns: tuple[str, ...], revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns], revision=revision))
    except (OSError, ValueError) as e:  # the hub's errors are subclasses
        raise ConfigError(
            f"{key}: {name!r} is no local folder, and the download from the hub failed ({first_line(e)}). Allowed: a "
            "folder with config.json, or the output folder of a finished training; a gated model on the hub needs a "
            "token, see huggingface-cli login"
        ) from e


def without_code(name: str, content: bytes) -> bytes:
    """A file of a model folder. A config loses `auto_map`, which names code for transformers to run."""
    if name.endswith("config.json"):
        config = json.loads(content)
        if isinstance(config, dict) and config.pop("auto_map", None) is not None:
            return json.dumps(config, indent=2).encode() + b"\n"
    return content
