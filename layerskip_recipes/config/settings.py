"""What may stand in a config: a check for every key, every section and every component's arguments.

Nothing in a config is ignored: a key is honoured, or refused by name with the nearest valid one.
"""

import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune import config as tune_config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import TransformerDecoder

from layerskip_recipes.config.checks import check_choice, check_number, check_text
from layerskip_recipes.config.components import parameter_names as component_parameters
from layerskip_recipes.errors import ConfigError

Check = Callable[[str, Any], None]


DEVICES = ("cpu", "cuda", "mps", "xpu")  # the later the better


def number(**bounds: Any) -> Check:
    """A setting that is a number, see `check_number`."""
    return lambda key, value: check_number(key, value, **bounds)


def one_of(*choices: Any) -> Check:
    """A setting that is one of the choices."""
    return lambda key, value: check_choice(key, value, choices)


def text(example: str, optional: bool = True) -> Check:
    """A setting that is text; null too if optional."""
    return lambda key, value: None if value is None and optional else check_text(key, value, example)


def device_kind(key: str, value: Any) -> None:
    """A device that a machine may have, not necessarily this one; null too."""
    text("cpu")(key, value)
    if value is not None and value.partition(":")[0] not in DEVICES:
        raise ConfigError(f"{key}: {value!r} is no device. Allowed: {', '.join(DEVICES)}; for example {key}=cpu")


def list_of(kind: type, example: str) -> Check:
    """A setting that is a list of one kind of thing; null too."""

    def check(key: str, value: Any) -> None:
        listed = isinstance(value, ListConfig) and all(type(item) is kind and item != "" for item in value)
        if value is not None and not listed:
            raise ConfigError(f"{key}: {value!r} is no list of {kind.__name__}; for example {key}={example}")

    return check


def component(positional: int = 0, given: Sequence[str] = (), optional: bool = False) -> Check:
    """A section with a `_component_`, see `check_component`; null too if optional."""
    return lambda key, value: (
        None if value is None and optional else check_component(value, key, given=given, positional=positional)
    )


def anything(key: str, value: Any) -> None:
    """A setting that is checked elsewhere, with others."""


flag = one_of(True, False, None)
SEED = number(minimum=0, maximum=2**31 - 1, optional=True)  # each rank adds its number to it
# What every recipe takes.
COMMON: dict[str, Check] = {
    "output_dir": text("/tmp/layerskip"),
    "model": component(),
    "checkpointer": component(given=["output_dir"]),
    "tokenizer": component(),
    "device": device_kind,
    "dtype": one_of("fp32", "bf16"),
    "seed": SEED,
    "float32_matmul_precision": one_of("highest", "high", "medium"),
}


def check_settings(
    cfg: DictConfig, settings: Mapping[str, Check], refused: Mapping[str, str], required: Sequence[str] = ()
) -> None:
    """Every top-level key of a config: known, honoured, and of the right form. Nothing is ignored.

    Args:
        cfg: the config.
        settings: the keys that the recipe reads, each with its check.
        refused: key of torchtune's -> why it is not honoured. Switched off (null, false, 0) such a key is fine.
        required: keys that must be there, beside the model, checkpointer, tokenizer and dtype.

    Raises:
        ValueError: the first thing that is wrong.
    """
    try:
        content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{e.full_key or 'config'}: {str(e).splitlines()[0]}") from e
    for key, value in content.items():
        if key in settings:
            settings[key](key, cfg[key])
        elif key in refused:
            if not (_is_off(value) or (key.endswith("_dim") and value == 1)):
                raise ConfigError(f"{key}: {value!r} is not honoured by this recipe: {refused[key]}. Set {key}=null")
        # A plain value may be the user's own variable, if an interpolation reads it.
        elif not re.search(r"\$\{" + re.escape(key) + r"[.}\[]", OmegaConf.to_yaml(cfg)):
            raise ConfigError(f"{key}: unknown key. {nearest(key, settings)}")
    for key in ("model", "checkpointer", "tokenizer", "dtype", *required):
        if key not in content:
            settings[key](key, None)


def _is_off(value: Any) -> bool:
    """Whether a setting of torchtune's asks for nothing: null, false, 0, or a section of such."""
    if isinstance(value, dict):
        return all(_is_off(part) for part in value.values())
    return value is None or (isinstance(value, int | float) and value == 0)


def nearest(key: str, known: Iterable[str]) -> str:
    """The nearest known key, or all of them, for the end of an error message."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"Nearest: {near[0]}" if near else f"Allowed: {', '.join(known)}"


def check_section(section: Any, key: str, callee: Callable, given: Sequence[str] = ()) -> dict[str, Any]:
    """A plain section of ours as the arguments of `callee`; its keys are the callee's parameters.

    Args:
        section: the section, or None.
        key: its name.
        callee: what takes it.
        given: parameters that do not come from the config.

    Raises:
        ValueError: if the section is no mapping, or has a key that the callee does not take.
    """
    if section is None:
        return {}
    if not isinstance(section, DictConfig):
        raise ConfigError(f"{key}: {section!r} is no section of keys and values; {key}=null switches it off")
    known = [name for name in inspect.signature(callee).parameters if name not in ("self", *given)]
    for name in section:
        if name not in known:
            raise ConfigError(f"{key}.{name}: unknown key. {nearest(str(name), known)}")
    return OmegaConf.to_container(section, resolve=True)


def check_component(section: Any, key: str, given: Sequence[str] = (), positional: int = 0) -> Callable:
    """The callable behind a section's `_component_`, its arguments checked against its signature.

    Args:
        section: the section.
        key: its name in the config.
        given: keyword arguments that the recipe adds.
        positional: how many positional arguments the recipe adds.

    Raises:
        ValueError: if there is no such component, an argument is unknown, or one is missing.
    """
    if not isinstance(section, DictConfig) or not isinstance(section.get("_component_"), str):
        raise ConfigError(f"{key}: {section!r} is not allowed. Allowed: a section with _component_: dotted.path")
    path = section["_component_"]
    try:
        found = _get_component_from_path(path)
    except (InstantiationError, ValueError) as e:
        raise ConfigError(f"{key}._component_: {path!r} cannot be imported ({str(e).splitlines()[-1]})") from e
    if not callable(found):
        raise ConfigError(f"{key}._component_: {path!r} is a {type(found).__name__}, and nothing that can be called")
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return found
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = [str(name) for name in section if name != "_component_"]
    for name in arguments:
        if name not in names and not open_ended:
            raise ConfigError(f"{key}.{name}: {path} takes no such argument. {nearest(name, names)}")
    for name in given:
        if name not in names and not open_ended:
            raise ConfigError(f"{key}._component_: {path!r} cannot be used here, it takes no argument {name}")
    required = [n for n in names[positional:] if parameters[n].default is inspect.Parameter.empty]
    missing = [n for n in required if n not in arguments and n not in given]
    if missing:
        raise ConfigError(f"{key}.{missing[0]}: missing; {path} needs it, for example {key}.{missing[0]}=...")
    return found


def build(section: DictConfig | None, key: str, *args: Any, **kwargs: Any) -> Any:
    """torchtune's `instantiate`, where what the component says against its arguments becomes a ValueError.

    Raises:
        ValueError: with the section's key and the component's own words.
    """
    try:
        return tune_config.instantiate(section, *args, **kwargs)
    except (TypeError, ValueError, OSError, RuntimeError, AssertionError, ArithmeticError, InstantiationError) as e:
        if isinstance(e, ConfigError):  # it says all that is needed
            raise ConfigError(f"{key}: {e}" if not str(e).startswith(key) else str(e)) from e
        given = ", ".join(f"{name}={value}" for name, value in section.items() if name != "_component_")
        raise ConfigError(f"{key}: {section._component_}({given}) cannot be built: {e!r}") from e


def check_device(cfg: DictConfig) -> torch.device:
    """The device of `cfg.device` (null: the best there is), from here on the current one.

    Raises:
        ValueError: if it is not on this machine.
    """
    there = ["cpu"]
    for name in DEVICES[1:]:
        backend = torch.backends.mps if name == "mps" else getattr(torch, name, None)
        if backend is not None and backend.is_available():
            there.append(name)
    wanted = there[-1] if cfg.get("device") is None else cfg.device
    kind, _, index = wanted.partition(":")
    count = getattr(torch, kind).device_count() if kind in there and kind not in ("cpu", "mps") else 1
    if kind not in there or (index and not (index.isdigit() and int(index) < count)):
        raise ConfigError(
            f"device: {wanted!r} is not there. On this machine: {', '.join(there)}; for example device={there[-1]}"
        )
    if kind == "cuda" and index:
        torch.cuda.set_device(int(index))  # torchtune and torch say "cuda" in places
    return torch.device(wanted)


def check_one_process() -> None:
    """Raises a ValueError under torchrun with several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            f"nproc_per_node: {os.environ['WORLD_SIZE']} processes, and this version runs on one device; start it "
            "without --nproc_per_node, or with --nproc_per_node 1"
        )


def check_dtype(cfg: DictConfig, device: torch.device) -> torch.dtype:
    """The dtype of `cfg.dtype`; raises a ValueError if the device cannot do it."""
    if cfg.dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"dtype: bf16 is not there on {torch.cuda.get_device_name(device)}; for example dtype=fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]


def build_on_meta(cfg: DictConfig) -> TransformerDecoder:
    """The model of `cfg.model` without memory for its weights: its depth, its length, its parameter names.

    Raises:
        ValueError: if the section is wrong or the builder refuses its arguments.
    """
    check_component(cfg.get("model"), "model")
    with torch.device("meta"):
        model = build(_unquantised(cfg.model), "model")
    if not isinstance(model, TransformerDecoder) or len(model.layers) == 0:
        layers = f" of {len(model.layers)} layers" if isinstance(model, TransformerDecoder) else ""
        raise ConfigError(
            f"model: {cfg.model._component_} builds a {type(model).__name__}{layers}. Allowed: a TransformerDecoder of "
            "1 layer or more"
        )
    check_number("model.max_seq_len", model.max_seq_len, minimum=1, example=2048)
    return model


def _unquantised(section: DictConfig) -> DictConfig:
    """A model's section without quantised weights: QLoRA's builders would quantise on the meta device too."""
    takes = component_parameters(section.get("_component_")) or ()
    changes: dict[str, Any] = {"quantize_base": False} if "quantize_base" in takes else {}
    if isinstance(section.get("base"), DictConfig):
        changes["base"] = _unquantised(section.base)
    return OmegaConf.merge(section, changes)
