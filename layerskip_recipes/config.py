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

from layerskip_recipes.checks import check_choice, check_number, check_text

PACKAGE = Path(__file__).parent
# The wheel carries the configs inside of the package, a checkout beside it.
CONFIG_DIR = next((d for d in (PACKAGE / "configs", PACKAGE.parent / "recipes" / "configs") if d.is_dir()), None)


# ---------------------------------------------------------------------------------------------------------- names


def our_configs() -> dict[str, Path]:
    """Our configs by short name, such as "quickstart/finetune"; the ones named _* are only there to be extended."""
    if CONFIG_DIR is None:
        return {}
    paths = sorted(path for path in CONFIG_DIR.rglob("*.yaml") if not path.name.startswith("_"))
    return {path.relative_to(CONFIG_DIR).with_suffix("").as_posix(): path for path in paths}


def torchtune_configs() -> dict[str, Path]:
    """torchtune's built-in configs by name, those whose file the wheel really has."""
    root = Path(torchtune.__file__).parent.parent / "recipes" / "configs"
    paths = {c.name: root / c.file_path for recipe in get_all_recipes() for c in recipe.configs}
    return {name: path for name, path in paths.items() if path.is_file()}


def find_config(name: str, relative_to: Path | None = None, key: str = "config") -> Path:
    """The file behind a path, one of our names, or one of torchtune's.

    Args:
        name: what stands behind `--config` or `extends:`.
        relative_to: the folder in which a relative path is looked for first.
        key: what an error message calls it.

    Raises:
        ValueError: if there is no such file or name; with the nearest names.
    """
    places = [*([relative_to / name] if relative_to else []), Path(name).expanduser()]
    # Also the ones named _*, which our_configs does not show.
    for path in [*places, *([CONFIG_DIR / f"{name}.yaml"] if CONFIG_DIR else [])]:
        try:
            if path.is_file():
                return path.resolve()
        except OSError:  # a name too long for the file system is no file
            continue
    known = torchtune_configs() | our_configs()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ValueError(
        f"{key}: {name!r} is neither a file nor a config's name."
        + (f" Nearest: {', '.join(near)}." if near else "")
        + " `layerskip ls` lists all."
    )


# ---------------------------------------------------------------------------------------------------------- merging


class _Loader(yaml.SafeLoader):
    """YAML as OmegaConf reads it (2e-5 is a number, no dates), but without numbers of base 60 and leading zeros,
    which would read the layers 1:5 as 65 and the file number 00003 as 3; and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9_]+)([eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in (*_NUMBERS, "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list("-+.0123456789"))


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
    cfg = _load_chain(find_config(name), ())
    later: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if key.startswith("~") and not equals:
            _remove(cfg, key[1:])
        elif equals and key:
            _set(later, cfg, key.split("."), parse_value(text))
        else:
            raise ValueError(f"override: {override!r} is not of the form key=value (or ~key to remove one)")
    return _to_config(_merge(cfg, later), name)


def _to_config(content: dict[str, Any], name: Any) -> DictConfig:
    try:
        return OmegaConf.create(content)
    except OmegaConfBaseException as e:
        raise ValueError(f"config: {name}: {str(e).splitlines()[0]}") from e


def _load_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise ValueError(f"extends: a cycle, {chain}. A config cannot extend itself")
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise ValueError(f"config: {path} cannot be read as YAML: {e}") from e
    if not isinstance(own, dict) or not all(isinstance(key, str) for key in own):
        raise ValueError(f"config: {path} holds no mapping of keys to values")
    _to_config(own, path)
    base = own.pop("extends", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise ValueError(f"extends: {base!r} is no name or path; for example extends: llama3_2/1B_full_single_device")
    return _merge(_load_chain(find_config(base, relative_to=path.parent, key="extends"), (*seen, path)), own)


def _merge(base: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """`later` over `base`: mappings merge, anything else replaces.

    Where a section's `_component_` changes, inherited arguments that the new one does not take stay behind.
    """
    merged = dict(base)
    for key, new in later.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            component = new.get("_component_", old.get("_component_"))
            if component != old.get("_component_", component):
                taken = _parameters(component)
                old = {name: value for name, value in old.items() if taken is None or name in taken}
            new = _merge(old, new)
        merged[key] = new
    return merged


def _parameters(component: Any) -> set[str] | None:
    """The parameters of a component; None if it takes any, or cannot be asked (check_component will say why)."""
    try:
        parameters = inspect.signature(_get_component_from_path(component)).parameters.values()
    except (InstantiationError, ValueError, TypeError, AttributeError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


def parse_value(text: str) -> Any:
    """An override's value: a list, a mapping or quoted text as in YAML, else one scalar, whatever it looks like."""
    if text == "None":
        return None
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError):
            return text
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))


def _set(later: dict[str, Any], cfg: dict[str, Any], path: list[str], value: Any) -> None:
    """Put one override into `later`; text for a section that has a component names another component."""
    *parents, leaf = path
    here: Any = cfg
    for name in parents:
        if not isinstance(later.get(name), dict):
            later[name] = {}
        later = later[name]
        here = here.get(name) if isinstance(here, dict) else None
    before = here.get(leaf) if isinstance(here, dict) else None
    if isinstance(value, str) and isinstance(before, dict) and "_component_" in before:
        section = later.setdefault(leaf, {})
        section["_component_"] = value
    else:
        later[leaf] = value


def _remove(cfg: dict[str, Any], key: str) -> None:
    *parents, leaf = key.split(".")
    node: Any = cfg
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        raise ValueError(f"override: ~{key} removes nothing, the config has no {key!r}")
    del node[leaf]


# ---------------------------------------------------------------------------------------------------------- checks

Check = Callable[[str, Any], None]


def number(**bounds: Any) -> Check:
    """A setting that is a number, see `check_number`."""
    return lambda key, value: check_number(key, value, **bounds)


def one_of(*choices: Any) -> Check:
    """A setting that is one of the choices."""
    return lambda key, value: check_choice(key, value, choices)


def text(example: str, optional: bool = True) -> Check:
    """A setting that is text; null too if optional."""
    return lambda key, value: None if value is None and optional else check_text(key, value, example)


def list_of(kind: type, example: str) -> Check:
    """A setting that is a list of one kind of thing; null too."""

    def check(key: str, value: Any) -> None:
        listed = isinstance(value, ListConfig) and all(type(item) is kind and item != "" for item in value)
        if value is not None and not listed:
            raise ValueError(f"{key}: {value!r} is no list of {kind.__name__}; for example {key}={example}")

    return check


def component(positional: int = 0, given: Sequence[str] = (), optional: bool = False) -> Check:
    """A section with a `_component_`, see `check_component`; null too if optional."""
    return lambda key, value: (
        None if value is None and optional else check_component(value, key, given=given, positional=positional)
    )


def anything(key: str, value: Any) -> None:
    """A setting that is checked elsewhere, with others."""


flag = one_of(True, False, None)
SEED = number(minimum=0, maximum=2**32 - 1, optional=True)
# What every recipe reads.
COMMON: dict[str, Check] = {
    "output_dir": text("/tmp/layerskip"),
    "model": component(),
    "checkpointer": component(given=["output_dir"]),
    "tokenizer": component(),
    "device": text("cpu"),
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
        refused: key of torchtune's -> why it is not honoured. Switched off (null, false, 1) such a key is fine.
        required: keys that must be there, beside the model, checkpointer, tokenizer and dtype.

    Raises:
        ValueError: the first thing that is wrong.
    """
    try:
        content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        raise ValueError(f"{e.full_key or 'config'}: {str(e).splitlines()[0]}") from e
    unresolved = OmegaConf.to_yaml(cfg)
    for key, value in content.items():
        if key in settings:
            settings[key](key, cfg[key])
        elif key in refused:
            if not (value is None or value is False or (value == 1 and value is not True)):
                raise ValueError(f"{key}: {value!r} is not honoured by this recipe: {refused[key]}. Set {key}=null")
        # A plain value may be the user's own variable, if an interpolation reads it.
        elif not re.search(r"\$\{" + re.escape(key) + r"[.}\[]", unresolved):
            raise ValueError(f"{key}: unknown key. {nearest(key, settings)}")
    for key in ("model", "checkpointer", "tokenizer", "dtype", *required):
        if key not in content:
            settings[key](key, None)


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
        raise ValueError(f"{key}: {section!r} is not allowed. Allowed: a section with _component_: dotted.path")
    path = section["_component_"]
    try:
        found = _get_component_from_path(path)
    except (InstantiationError, ValueError) as e:
        raise ValueError(f"{key}._component_: {path!r} cannot be imported ({str(e).splitlines()[-1]})") from e
    if not callable(found):
        raise ValueError(f"{key}._component_: {path!r} is a {type(found).__name__}, and nothing that can be called")
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return found
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = [str(name) for name in section if name != "_component_"]
    for name in arguments:
        if name not in names and not open_ended:
            raise ValueError(f"{key}.{name}: {path} takes no such argument. {nearest(name, names)}")
    for name in given:
        if name not in names and not open_ended:
            raise ValueError(f"{key}._component_: {path!r} cannot be used here, it takes no argument {name}")
    required = [n for n in names[positional:] if parameters[n].default is inspect.Parameter.empty]
    missing = [n for n in required if n not in arguments and n not in given]
    if missing:
        raise ValueError(f"{key}.{missing[0]}: missing; {path} needs it, for example {key}.{missing[0]}=...")
    return found


def build(section: DictConfig | None, key: str, *args: Any, **kwargs: Any) -> Any:
    """torchtune's `instantiate`, where what the component says against its arguments becomes a ValueError.

    Raises:
        ValueError: with the section's key and the component's own words.
    """
    try:
        return tune_config.instantiate(section, *args, **kwargs)
    except (TypeError, ValueError, OSError, RuntimeError, AssertionError, ArithmeticError, InstantiationError) as e:
        if _is_ours(e):  # it says all that is needed
            raise ValueError(f"{key}: {e}" if not str(e).startswith(key) else str(e)) from e
        given = ", ".join(f"{name}={value}" for name, value in section.items() if name != "_component_")
        raise ValueError(f"{key}: {section._component_}({given}) cannot be built: {e!r}") from e


def check_device(cfg: DictConfig) -> torch.device:
    """The device of `cfg.device` (null: the best there is); raises a ValueError if it is not on this machine."""
    there = ["cpu"]
    for name in ("cuda", "mps", "xpu"):
        backend = torch.backends.mps if name == "mps" else getattr(torch, name, None)
        if backend is not None and backend.is_available():
            there.append(name)
    wanted = there[-1] if cfg.get("device") is None else cfg.device
    kind, _, index = wanted.partition(":")
    count = getattr(torch, kind).device_count() if kind in there and kind not in ("cpu", "mps") else 1
    if kind not in there or (index and not (index.isdigit() and int(index) < count)):
        raise ValueError(
            f"device: {wanted!r} is not there. On this machine: {', '.join(there)}; for example device={there[-1]}"
        )
    return torch.device(wanted)


def check_dtype(cfg: DictConfig, device: torch.device) -> torch.dtype:
    """The dtype of `cfg.dtype`; raises a ValueError if the device cannot do it."""
    if cfg.dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"dtype: bf16 is not there on {torch.cuda.get_device_name(device)}; for example dtype=fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]


def build_on_meta(cfg: DictConfig) -> TransformerDecoder:
    """The model of `cfg.model` without memory for its weights: its depth, its length, its parameter names.

    Raises:
        ValueError: if the section is wrong or the builder refuses its arguments.
    """
    check_component(cfg.get("model"), "model")
    with torch.device("meta"):
        model = build(cfg.model, "model")
    if not isinstance(model, TransformerDecoder) or len(model.layers) == 0:
        layers = f" of {len(model.layers)} layers" if isinstance(model, TransformerDecoder) else ""
        raise ValueError(
            f"model: {cfg.model._component_} builds a {type(model).__name__}{layers}. Allowed: a TransformerDecoder of "
            "1 layer or more"
        )
    check_number("model.max_seq_len", model.max_seq_len, minimum=1, example=2048)
    return model


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
        if not _is_ours(e):
            raise
        fail(e)


def _is_ours(error: Exception) -> bool:
    """Whether this package raised the error."""
    return isinstance(error, ValueError) and Path(
        traceback.extract_tb(error.__traceback__)[-1].filename
    ).is_relative_to(PACKAGE)


def fail(error: ValueError) -> NoReturn:
    """Print the error as the last line on stderr and exit with status 1."""
    print(f"ValueError: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(1)


def as_list(value: Any) -> list[Any]:
    """A YAML value that may be one thing or a list of them."""
    return list(value) if isinstance(value, ListConfig) else [value]
