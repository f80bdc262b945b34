"""Find a config's file by path, by one of our names, or by one of torchtune's."""

import difflib
import runpy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from layerskip_recipes.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
# Configs are inside the package in a wheel, and beside it in a checkout.
CONFIG_DIR = next(d for d in (PACKAGE / "configs", PACKAGE.parent / "recipes" / "configs") if d.is_dir())
# The scripts that write what the configs of removed folders read: {folder: (script, its folder of data)}.
REPLACED_BY_SCRIPTS = {"task": ("spoken_commands", "commands"), "bfcl": ("function_calls", "bfcl")}


def our_configs() -> dict[str, Path]:
    """Our configs by short name, such as "quickstart/finetune", without the base configs named _*."""
    paths = sorted(path for path in CONFIG_DIR.rglob("*.yaml") if not path.name.startswith("_"))
    return {path.relative_to(CONFIG_DIR).with_suffix("").as_posix(): path for path in paths}


def torchtune_configs() -> dict[str, Path]:
    """torchtune's built-in configs by name. Some registered files are missing from its wheel."""
    torchtune = find_spec("torchtune")
    assert torchtune is not None and torchtune.origin is not None
    package = Path(torchtune.origin).parent.resolve()
    # Running the registry takes a millisecond; importing torchtune takes seconds.
    recipes = runpy.run_path(str(package / "_recipe_registry.py"))["get_all_recipes"]()
    root = package.parent / "recipes" / "configs"
    paths = {c.name: root / c.file_path for recipe in recipes for c in recipe.configs}
    return {name: path for name, path in paths.items() if path.is_file()}


def find_config(name: str, relative_to: Path | None = None, key: str = "config") -> Path:
    """The file of a config. Relative paths start from `relative_to` first; `key` is for error messages."""
    places = [*([relative_to / name] if relative_to else []), Path(name).expanduser()]
    # The last path also finds base configs (_*), which our_configs leaves out.
    for path in [*places, CONFIG_DIR / f"{name}.yaml"]:
        try:
            if path.is_file():
                return path.resolve()
        except OSError:  # the name is too long for the file system
            continue
    known = torchtune_configs() | our_configs()
    if name in known:
        return known[name]
    if instead := _instead_of_removed(name, known):
        raise ConfigError(f"{key}: {name!r} was removed. {instead}")
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ConfigError(
        f"{key}: {name!r} is neither a file nor a config name."
        + (f" Nearest: {', '.join(near)}." if near else "")
        + " `layerskip ls` lists all."
    )


def _instead_of_removed(name: str, known: Mapping[str, Path]) -> str | None:
    """What to write instead of the name of a config that was removed; None for other names."""
    theirs = name.removesuffix("_layerskip")
    if theirs in known:
        bases = f"[{theirs}, _layerskip{'' if 'lora' in theirs else ', _adamw'}]"
        return f"layerskip_finetune adds LayerSkip's sections to --config {theirs}; in a file, write extends: {bases}"
    folder, _, config = name.partition("/")
    ours = f"qa/{config}"
    if folder in REPLACED_BY_SCRIPTS and ours in known:
        script, data = REPLACED_BY_SCRIPTS[folder]
        return f"Write its data with `python examples/{script}.py {data}`, and then --config {ours} data_dir={data}"
    return None
