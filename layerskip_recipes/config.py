"""From a config's name to the merged config: lookup, `extends`, overrides; and the command line of a recipe.

A LayerSkip config is any torchtune config plus plain sections of ours. What may stand in it is in `settings.py`.
"""

import argparse
import difflib
import inspect
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torchtune
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune import utils
from torchtune._recipe_registry import get_all_recipes
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from layerskip_recipes.checks import PACKAGE, is_ours

# The wheel carries the configs inside of the package, a checkout beside it.
CONFIG_DIR = next((d for d in (PACKAGE / "configs", PACKAGE.parent / "recipes" / "configs") if d.is_dir()), None)


PATHS = re.compile("(dir|path|file|files|checkpoint|report|picture|source|shots)$")  # how the keys of paths end

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


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # in C, where there is one
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
        The config, interpolations unresolved, without `extends`; paths in the home folder, ~/..., are whole.

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
            _check_colons(key, text)
            _set(later, cfg, key.split("."), parse_value(text))
        else:
            raise ValueError(f"override: {override!r} is not of the form key=value (or ~key to remove one)")
    return _to_config(_at_home(_merge(cfg, later)), name)


def _at_home(content: Any, key: str = "") -> Any:
    """With the ~/ that begins a path as the home folder: a shell knows it, a file system does not."""
    if isinstance(content, dict):
        return {name: _at_home(value, str(name)) for name, value in content.items()}
    if isinstance(content, list):
        return [_at_home(value, key) for value in content]
    a_path = isinstance(content, str) and content.startswith("~/") and PATHS.search(key)
    return str(Path(content).expanduser()) if a_path else content


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
                taken = component_parameters(component)
                old = {name: value for name, value in old.items() if taken is None or name in taken}
            new = _merge(old, new)
        merged[key] = new
    return merged


def component_parameters(component: Any) -> set[str] | None:
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


def _check_colons(key: str, text: str) -> None:
    """Raises a ValueError for {name:value}, which in YAML is a name without a value."""
    spaced = re.sub(r"([{,]\s*[\w.]+):(?=\S)", r"\1: ", text)
    if text[:1] in ("{", "[") and "{" in text and spaced != text:
        meant = parse_value(spaced)
        if not isinstance(meant, str) and meant != parse_value(text):
            raise ValueError(f"override: {key}={text} lacks a space behind a colon; for example {key}='{spaced}'")


def _set(later: dict[str, Any], cfg: dict[str, Any], path: list[str], value: Any) -> None:
    """Put one override into `later`; text for a section that has a component names another component."""
    *parents, leaf = path
    here: Any = cfg
    for name in parents:
        if not isinstance(later.get(name), dict):
            if name in later and isinstance(here, dict):
                here.pop(name, None)  # it was replaced by something else before: the old section does not come back
            later[name] = {}
        later = later[name]
        here = here.get(name) if isinstance(here, dict) else None
    before = here.get(leaf) if isinstance(here, dict) else None
    if isinstance(value, str) and isinstance(before, dict) and "_component_" in before:
        if not isinstance(later.get(leaf), dict):
            later[leaf] = {}
        later[leaf]["_component_"] = value
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


# ---------------------------------------------------------------------------------------------------- command line


def is_for_all(record: logging.LogRecord) -> bool:
    """Whether a process logs a record: the first one does, others errors only, which they may have alone."""
    return record.levelno >= logging.ERROR or int(os.environ.get("RANK", 0)) == 0


def build_recipe(recipe: Callable[[DictConfig], Any], description: str) -> Any:
    """Parse `--config NAME [key=value ...]` and construct the recipe, whose constructor checks all settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name that `layerskip ls` lists")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides; ~key removes a key")
    args, unknown = parser.parse_known_args()
    utils.get_logger("INFO").addFilter(is_for_all)
    if unknown:
        raise ValueError(f"argument: {unknown[0]!r} is unknown. Allowed: --config NAME and overrides key=value")
    cfg = load_config(args.config, args.overrides)
    try:
        return recipe(cfg)
    except ValueError as e:
        from layerskip_recipes.cli import recipe_of  # which imports all of them

        meant, own = recipe_of(cfg), f"layerskip_{recipe.__name__.removeprefix('LayerSkip').lower()}"
        if is_ours(e) and ": unknown key. " in str(e) and meant != own:
            raise ValueError(f"{e}. The config looks like one for `tune run {meant}`") from e
        raise


# What gloo says where a process that it waits for is no more, or the network to it; which is a matter of what was
# under way.
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def main_of(steps: Callable[[], None]) -> None:
    """Run a recipe's main. A user's mistake becomes one last line on stderr and exit status 1, without a traceback.

    A ValueError raised by this package is a user's mistake; any other exception is not, and keeps its traceback.
    """
    try:
        steps()
        sys.stdout.flush()
    except ValueError as e:
        if not is_ours(e):
            raise
        fail(e)
    except RuntimeError as e:
        if not ("gloo" in str(e) and any(lost in str(e) for lost in PEER_ENDED)):
            raise
        # The usual case: another rank said why it ended, and torchrun ends this one before it says more.
        time.sleep(2)
        first = str(e).splitlines()[0]
        print(f"RuntimeError: another process ended or cannot be reached: {first}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written at the end
        sys.exit(1)
    except KeyboardInterrupt:  # while it loads, say; where there are figures to print, recipes stop by themselves
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(error: ValueError) -> NoReturn:
    """Print the error as the last line on stderr and exit with status 1."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        # A mistake that all processes find is said by the first one, and torchrun ends this one meanwhile.
        time.sleep(5)
    print(f"ValueError: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(1)
