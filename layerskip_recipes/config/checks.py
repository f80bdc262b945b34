"""Is a setting what it must be? Each check raises one ValueError: the key, the value given, what is allowed."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from layerskip_recipes.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
PICTURES = (".png", ".pdf", ".svg")  # what a picture's name may end in


def check_number(
    key: str,
    value: Any,
    *,
    minimum: float,
    maximum: float = math.inf,
    integer: bool = True,
    above: bool = False,
    optional: bool = False,
    example: Any = None,
) -> None:
    """Raises a ValueError unless value is a number in a range.

    Args:
        key: the setting's name.
        value: what was given.
        minimum, maximum: the range, both ends allowed.
        integer: whether it must be one.
        above: the minimum itself is not allowed.
        optional: None is allowed too.
        example: a value that works, for the message; the minimum by default.
    """
    if value is None and optional:
        return
    number = not isinstance(value, bool) and isinstance(value, int if integer else int | float)
    if number and (value > minimum if above else value >= minimum) and value <= maximum and value < math.inf:
        return
    what = "an integer" if integer else "a number"
    end = f" to {maximum}" if maximum < math.inf else "" if above else " or more"
    allowed = f"{what} {'above' if above else 'of'} {minimum}{end}"
    raise ConfigError(
        f"{key}: {value!r} is not allowed. Allowed: {allowed}{' (or null)' if optional else ''}; "
        f"for example {key}={minimum if example is None else example}"
    )


def check_choice(key: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises a ValueError unless value is one of the choices."""
    choices = list(choices)
    # By type too: True is no 1, and a list from YAML is nothing to look up.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        shown = [{None: "null", True: "true", False: "false"}.get(choice, str(choice)) for choice in choices]
        raise ConfigError(f"{key}: {value!r} is not allowed. Allowed: {', '.join(shown)}; for example {key}={shown[0]}")


def check_folder(key: str, folder: Path) -> None:
    """Raises a ValueError if it is no folder and cannot become one. Nothing is made here."""
    path = folder.absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise ConfigError(f"{key}: {str(folder)!r} cannot be written, {str(existing)!r} is in the way")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{key}: {str(folder)!r} cannot be written, {str(existing)!r} gives no permission to")


def check_ending(key: str, name: str | None, endings: Sequence[str]) -> None:
    """Raises a ValueError if a file's name has none of the endings; None is no name."""
    if name and Path(name).suffix.lower() not in endings:
        raise ConfigError(
            f"{key}: {name!r} is not allowed. Allowed: names that end in {', '.join(endings)}; for example "
            f"{key}={Path(name).stem or key}{endings[0]}"
        )


def check_file(key: str, name: str) -> None:
    """Raises a ValueError if no file of that name can be written."""
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"{key}: {name!r} is a folder. Allowed: a file; for example {key}={name.rstrip('/')}/{key}")
    if not path.exists():
        check_folder(key, path.parent)
    elif not os.access(path, os.W_OK):  # its folder does not matter then: /dev/stdout
        raise ConfigError(
            f"{key}: {name!r} cannot be written, it is there and protected. Allowed: another file; for example "
            f"{key}={path.with_stem(path.stem + '_2')}"
        )


def check_text(key: str, value: Any, example: str) -> None:
    """Raises a ValueError unless value is text, and not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key}: {value!r} is not allowed. Allowed: text; for example {key}={example}")
