"""From a config's name to a checked config: lookup, `extends`, command line, and what is wrong with it in one line.

A LayerSkip config is any torchtune config plus plain sections of ours. Nothing in it is ignored: a key is honoured,
or refused by name with the nearest valid one.
"""

import argparse
import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torchtune
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune import config as tune_config
from torchtune._recipe_registry import get_all_recipes
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import TransformerDecoder

PACKAGE = Path(__file__).parent
# The wheel carries the configs inside of the package, a checkout beside it.
CONFIG_DIR = next((d for d in (PACKAGE / "configs", PACKAGE.parent / "recipes" / "configs") if d.is_dir()), None)


# ---------------------------------------------------------------------------------------------------------- names


def our_configs() -> dict[str, Path]:
    """Our configs by short name, such as "quickstart/finetune"; files named _*.yaml are only there to be extended."""
    if CONFIG_DIR is None:
        return {}
    paths = sorted(path for path in CONFIG_DIR.rglob("*.yaml") if not path.name.startswith("_"))
    return {path.relative_to(CONFIG_DIR).with_suffix("").as_posix(): path for path in paths}


def torchtune_configs() -> dict[str, Path]:
    """torchtune's built-in configs by name, those whose file the wheel really has."""
    root = Path(torchtune.__file__).parent.parent / "recipes" / "configs"
    paths = {c.name: root / c.file_path for recipe in get_all_recipes() for c in recipe.configs}
    return {name: path for name, path in paths.items() if path.is_file()}


def find_config(name: str, relative_to: Path | None = None) -> Path:
    """The file behind a path, one of our names, or one of torchtune's.

    Args:
        name: what stands behind `--config` or `extends:`.
        relative_to: the folder in which a relative path is looked for first.

    Raises:
        ValueError: if there is no such file or name; with the nearest names.
    """
    for path in (*([relative_to / name] if relative_to else []), Path(name).expanduser()):
        if path.is_file():
            return path.resolve()
    known = torchtune_configs() | our_configs()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ValueError(
        f"config: {name!r} is neither a file nor a config's name."
        + (f" Nearest: {', '.join(near)}." if near else "")
        + " `layerskip ls` lists all."
    )


# ---------------------------------------------------------------------------------------------------------- merging


def load_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The merged config: the chain of `extends` from its root down, then the overrides.

    Args:
        name: a path, one of our names or one of torchtune's.
        overrides: "key=value", dotted keys, "~key" to remove one. A component's own key sets its `_component_`.

    Returns:
        The config, interpolations unresolved, without `extends`.

    Raises:
        ValueError: for an unknown name, a cycle, a file that is no YAML mapping, or an override of another form.
    """
    return merge(_load_chain(find_config(name), ()), overrides)


def _load_chain(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if path in seen:
        raise ValueError(
            f"extends: a cycle, {' -> '.join(p.name for p in (*seen, path))}. A config cannot extend itself"
        )
    try:
        own = OmegaConf.load(path)
    except Exception as e:
        raise ValueError(f"config: {path} cannot be read as YAML: {' '.join(str(e).split())}") from e
    if not isinstance(own, DictConfig):
        raise ValueError(f"config: {path} holds no mapping of keys to values")
    base = own.pop("extends", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise ValueError(f"extends: {base!r} is no name or path, for example extends: llama3_2/1B_full_single_device")
    return _merge_configs(_load_chain(find_config(base, relative_to=path.parent), (*seen, path)), own)


def merge(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config with command-line overrides applied; see `load_config`."""
    cfg = OmegaConf.create(cfg)
    for override in overrides:
        key, equals, value = override.partition("=")
        if key.startswith("~") and not equals:
            _remove(cfg, key[1:])
            continue
        if not equals or not key:
            raise ValueError(f"override: {override!r} is not of the form key=value (or ~key to remove one)")
        parsed = _parse_value(key, value)
        try:
            here = OmegaConf.select(cfg, key)
        except OmegaConfBaseException:
            here = None
        if isinstance(here, DictConfig) and "_component_" in here and value not in ("null", "None", "~", ""):
            key = f"{key}._component_"
        later = OmegaConf.create()
        OmegaConf.update(later, key, parsed)
        cfg = _merge_configs(cfg, later)
    return cfg


def _parse_value(key: str, value: str) -> Any:
    """An override's value as YAML, but text stays text where YAML would see a block in it: "-", "def f(n):"."""
    if value == "None":
        return None
    # A file number such as 00003 must stay text.
    if key.endswith("max_filename"):
        return value
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"])._get_node("value")
    except yaml.YAMLError:
        return value
    block = isinstance(parsed, DictConfig | ListConfig) and not value.lstrip().startswith(("{", "[", "${"))
    return value if block else parsed


def _remove(cfg: DictConfig, key: str) -> None:
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig) or leaf not in node:
        raise ValueError(f"override: ~{key} removes nothing, the config has no {key!r}")
    del node[leaf]


def _merge_configs(base: DictConfig, later: DictConfig) -> DictConfig:
    """OmegaConf's merge, but where a section's `_component_` changes, arguments that the new one lacks stay behind."""
    base = OmegaConf.create(base)
    for key in later:
        old, new = base._get_node(key), later._get_node(key)
        if not (isinstance(old, DictConfig) and isinstance(new, DictConfig)) or old._is_none() or new._is_none():
            continue
        component = new.get("_component_")
        if component is not None and old.get("_component_") not in (None, component):
            try:
                accepted = inspect.signature(_get_component_from_path(component)).parameters
            except (InstantiationError, ValueError, TypeError):
                continue  # check_component will say what is wrong with it
            if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
                for argument in [a for a in old if a not in accepted and a != "_component_"]:
                    del old[argument]
    return OmegaConf.merge(base, later)


# ---------------------------------------------------------------------------------------------------------- checks


def nearest(key: str, known: Iterable[str]) -> str:
    """ " Nearest: x." or the whole list, for the end of an error message."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"Nearest: {near[0]}" if near else f"Allowed: {', '.join(known)}"


def check_keys(cfg: DictConfig, honoured: Iterable[str], refused: Mapping[str, str]) -> None:
    """Raises a ValueError for a top-level key that the recipe does not know, or knows and does not honour.

    Args:
        cfg: the config.
        honoured: the keys that the recipe reads.
        refused: key of torchtune's -> why not. Switched off (null, false) such a key is fine.
    """
    honoured = set(honoured)
    text = OmegaConf.to_yaml(cfg)
    for key in cfg:
        if key in honoured or not isinstance(key, str):
            continue
        if key in refused:
            if cfg[key] not in (None, False):
                raise ValueError(f"{key}: {cfg[key]!r} is not honoured by this recipe: {refused[key]}. Set {key}=null")
        # A plain value may be the user's own variable, if an interpolation reads it.
        elif not re.search(r"\$\{" + re.escape(key) + r"[.}\[]", text):
            raise ValueError(f"{key}: unknown key. {nearest(key, honoured)}")


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
        raise ValueError(f"{key}: {section!r} is no section of keys and values; {key}=null switches it off")
    known = [name for name in inspect.signature(callee).parameters if name not in ("self", *given)]
    for name in section:
        if name not in known:
            raise ValueError(f"{key}.{name}: unknown key. {nearest(str(name), known)}")
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
        raise ValueError(f"{key}: needs a section with _component_: dotted.path, got {section!r}")
    path = section["_component_"]
    try:
        component = _get_component_from_path(path)
    except (InstantiationError, ValueError) as e:
        raise ValueError(f"{key}._component_: {path!r} cannot be imported ({str(e).splitlines()[-1]})") from e
    try:
        parameters = inspect.signature(component).parameters
    except (TypeError, ValueError):
        return component
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = [str(name) for name in section if name != "_component_"]
    for name in arguments:
        if name not in names and not open_ended:
            raise ValueError(f"{key}.{name}: {path} takes no such argument. {nearest(name, names)}")
    required = [n for n in names[positional:] if parameters[n].default is inspect.Parameter.empty]
    missing = [n for n in required if n not in arguments and n not in given]
    if missing:
        raise ValueError(f"{key}.{missing[0]}: missing; {path} needs it, for example {key}.{missing[0]}=...")
    return component


def check_number(
    cfg: DictConfig,
    key: str,
    *,
    minimum: float,
    integer: bool = True,
    optional: bool = False,
    default: Any = None,
    example: Any = None,
) -> Any:
    """`cfg.key` if it is a number of at least `minimum` (None if optional).

    Raises:
        ValueError: otherwise.
    """
    value = OmegaConf.select(cfg, key, default=default)
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float) or not value >= minimum:
        what = "an integer" if integer else "a number"
        raise ValueError(
            f"{key}: {value!r} is not {what} of {minimum} or more{' (or null)' if optional else ''}; "
            f"for example {key}={minimum if example is None else example}"
        )
    return value


def check_device(cfg: DictConfig) -> torch.device:
    """Raises a ValueError unless `cfg.device` (null: the best there is) is on this machine."""
    there = ["cpu"]
    for name in ("cuda", "mps", "xpu"):
        backend = torch.backends.mps if name == "mps" else getattr(torch, name, None)
        if backend is not None and backend.is_available():
            there.append(name)
    wanted = cfg.get("device") or there[-1]
    kind, _, index = str(wanted).partition(":")
    count = getattr(torch, kind).device_count() if kind in there and kind not in ("cpu", "mps") else 1
    if kind not in there or (index and not (index.isdigit() and int(index) < count)):
        raise ValueError(
            f"device: {wanted!r} is not there. On this machine: {', '.join(there)}; for example device={there[-1]}"
        )
    return torch.device(str(wanted))


def check_dtype(cfg: DictConfig, device: torch.device) -> torch.dtype:
    """Raises a ValueError unless `cfg.dtype` is fp32 or bf16 and the device can do it."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    wanted = cfg.get("dtype", "fp32")
    if wanted not in dtypes:
        raise ValueError(f"dtype: {wanted!r} is not supported. Allowed: fp32, bf16; for example dtype=fp32")
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"dtype: bf16 is not there on {torch.cuda.get_device_name(device)}; for example dtype=fp32")
    return dtypes[wanted]


def check_precision(cfg: DictConfig) -> None:
    """Raises a ValueError unless `cfg.float32_matmul_precision` is one of PyTorch's."""
    allowed = ("highest", "high", "medium")
    if cfg.get("float32_matmul_precision", "highest") not in allowed:
        raise ValueError(
            f"float32_matmul_precision: {cfg.float32_matmul_precision!r} is unknown. Allowed: {', '.join(allowed)}; "
            "for example float32_matmul_precision=highest"
        )


def build_on_meta(cfg: DictConfig) -> TransformerDecoder:
    """The model of `cfg.model` without memory for its weights: its depth, its length, its parameter names.

    Raises:
        ValueError: if the section is wrong or the builder refuses its arguments.
    """
    check_component(cfg.get("model"), "model")
    try:
        with torch.device("meta"):
            model = tune_config.instantiate(cfg.model)
    except Exception as e:
        raise ValueError(f"model: {cfg.model._component_} cannot be built: {e}") from e
    if not isinstance(model, TransformerDecoder):
        raise ValueError(f"model: {cfg.model._component_} builds a {type(model).__name__}, not a TransformerDecoder")
    return model


def check_interpolations(cfg: DictConfig) -> None:
    """Raises a ValueError naming the key whose ${...} leads nowhere, or that is missing (???)."""
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        raise ValueError(f"{e.full_key or 'config'}: {str(e).splitlines()[0]}") from e


# ---------------------------------------------------------------------------------------------------- command line


def build_recipe(recipe: Callable[[DictConfig], Any], description: str) -> Any:
    """Parse `--config NAME [key=value ...]` and construct the recipe, whose constructor checks all settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name that `layerskip ls` lists")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides; ~key removes a key")
    args, unknown = parser.parse_known_args()
    if unknown:
        raise ValueError(f"argument: {unknown[0]!r} is unknown. Allowed: --config NAME and overrides key=value")
    return recipe(load_config(args.config, args.overrides))


def main_of(steps: Callable[[], None]) -> None:
    """Run a recipe's main. A user's mistake becomes one last line on stderr and exit status 1, without a traceback.

    A ValueError raised by this package is a user's mistake; any other exception is not, and keeps its traceback.
    """
    try:
        steps()
    except ValueError as e:
        frames = traceback.extract_tb(e.__traceback__)
        if not Path(frames[-1].filename).is_relative_to(PACKAGE):
            raise
        fail(e)


def fail(error: ValueError) -> NoReturn:
    """Print the error as the last line on stderr and exit with status 1."""
    print(f"ValueError: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(1)


def as_list(value: Any) -> list[Any]:
    """A YAML value that may be one thing or a list of them."""
    return list(value) if isinstance(value, ListConfig) else [value]
