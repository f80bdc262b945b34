"""A config's name to its file: a path, one of our names, or one of torchtune's."""

import difflib
import runpy
from importlib.util import find_spec
from pathlib import Path

from layerskip_recipes.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
# The wheel carries the configs inside of the package, a checkout beside it.
CONFIG_DIR = next(d for d in (PACKAGE / "configs", PACKAGE.parent / "recipes" / "configs") if d.is_dir())


def our_configs() -> dict[str, Path]:
    """Our configs by short name, such as "quickstart/finetune"; the ones named _* are only there to be extended."""
    paths = sorted(path for path in CONFIG_DIR.rglob("*.yaml") if not path.name.startswith("_"))
    return {path.relative_to(CONFIG_DIR).with_suffix("").as_posix(): path for path in paths}


def torchtune_configs() -> dict[str, Path]:
    """torchtune's built-in configs by name, those whose file the wheel really has."""
    torchtune = find_spec("torchtune")
    assert torchtune is not None and torchtune.origin is not None
    package = Path(torchtune.origin).parent
    # The registry alone is read in a millisecond; the import of torchtune takes seconds.
    recipes = runpy.run_path(str(package / "_recipe_registry.py"))["get_all_recipes"]()
    root = package.parent / "recipes" / "configs"
    paths = {c.name: root / c.file_path for recipe in recipes for c in recipe.configs}
    return {name: path for name, path in paths.items() if path.is_file()}


def find_config(name: str, relative_to: Path | None = None, key: str = "config") -> Path:
    """The file behind a path, one of our names, or one of torchtune's.

    A relative path is looked for in the folder `relative_to` first. `key` is what an error message calls the name.
    """
    places = [*([relative_to / name] if relative_to else []), Path(name).expanduser()]
    # Also the ones named _*, which our_configs does not show.
    for path in [*places, CONFIG_DIR / f"{name}.yaml"]:
        try:
            if path.is_file():
                return path.resolve()
        except OSError:  # a name too long for the file system is no file
            continue
    known = torchtune_configs() | our_configs()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ConfigError(
        f"{key}: {name!r} is neither a file nor a config's name."
        + (f" Nearest: {', '.join(near)}." if near else "")
        + " `layerskip ls` lists all."
    )
