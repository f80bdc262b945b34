"""Reads JSON files. Checks, without creating anything, that a recipe can write to its paths."""

import json
import os
from pathlib import Path
from typing import Any

from layerskip_recipes.errors import ConfigError, first_line


def read_json(file: Path, key: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The mapping in a JSON file. Raises a ConfigError that names `key` if the file is damaged, or missing without a
    `default`."""
    if default is not None and not file.exists():
        return default
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as e:  # the last for deep nesting
        raise ConfigError(f"{key}: {str(file.parent)!r} holds no readable {file.name} ({first_line(e)})") from e


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_folder(key: str, folder: Path) -> None:
    """Raises a ConfigError if the folder can neither be written to nor created."""
    nearest = existing(folder)
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        why = "is write-protected" if nearest.is_dir() else "is in the way"
        raise ConfigError(f"{key}: {str(folder)!r} cannot be written, {str(nearest)!r} {why}")


def check_file(key: str, name: str) -> None:
    """Raises a ConfigError if the file can neither be written nor created."""
    path = Path(name)
    if not path.exists():
        check_folder(key, path.parent)
    elif path.is_dir() or not os.access(path, os.W_OK):  # an existing file needs no writable folder: /dev/stdout
        why = "is a folder" if path.is_dir() else "cannot be written, it is write-protected"
        raise ConfigError(f"{key}: {name!r} {why}. Allowed: another file; for example {key}={name.rstrip('/')}_2")
