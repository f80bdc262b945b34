"""Early checks of the paths that a recipe will write to. They create nothing."""

import os
from collections.abc import Sequence
from pathlib import Path

from layerskip_recipes.errors import ConfigError

PICTURES = (".png", ".pdf", ".svg")


def check_folder(key: str, folder: Path) -> None:
    """Raises a ConfigError if the folder can neither be written to nor created."""
    path = folder.absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise ConfigError(f"{key}: {str(folder)!r} cannot be written, {str(existing)!r} is in the way")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{key}: {str(folder)!r} cannot be written, no write permission for {str(existing)!r}")


def check_ending(key: str, name: str | None, endings: Sequence[str]) -> None:
    """Raises a ConfigError unless the file name is empty or has one of the endings."""
    if name and Path(name).suffix.lower() not in endings:
        raise ConfigError(
            f"{key}: {name!r} is not allowed. Allowed: names that end in {', '.join(endings)}; for example "
            f"{key}={Path(name).stem or key}{endings[0]}"
        )


def check_file(key: str, name: str) -> None:
    """Raises a ConfigError if the file can neither be written nor created."""
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"{key}: {name!r} is a folder. Allowed: a file; for example {key}={name.rstrip('/')}/{key}")
    if not path.exists():
        check_folder(key, path.parent)
    elif not os.access(path, os.W_OK):  # an existing file needs no writable folder: /dev/stdout
        raise ConfigError(
            f"{key}: {name!r} cannot be written, it is write-protected. Allowed: another file; for example "
            f"{key}={path.with_stem(path.stem + '_2')}"
        )
