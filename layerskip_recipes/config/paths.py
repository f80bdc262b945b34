"""Early checks of the paths that a recipe will write to. They create nothing."""

import os
from pathlib import Path

from layerskip_recipes.errors import ConfigError


def check_folder(key: str, folder: Path) -> None:
    """Raises a ConfigError if the folder can neither be written to nor created."""
    path = folder.absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        why = "is write-protected" if existing.is_dir() else "is in the way"
        raise ConfigError(f"{key}: {str(folder)!r} cannot be written, {str(existing)!r} {why}")


def check_file(key: str, name: str) -> None:
    """Raises a ConfigError if the file can neither be written nor created."""
    path = Path(name)
    if not path.exists():
        check_folder(key, path.parent)
    elif path.is_dir() or not os.access(path, os.W_OK):  # an existing file needs no writable folder: /dev/stdout
        why = "is a folder" if path.is_dir() else "cannot be written, it is write-protected"
        raise ConfigError(f"{key}: {name!r} {why}. Allowed: another file; for example {key}={name.rstrip('/')}_2")
