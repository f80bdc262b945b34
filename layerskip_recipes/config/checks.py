"""Is a setting what it must be? Each check raises one ValueError: the key, the value given, what is allowed."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerskip_recipes.config.paths import PICTURES, check_ending, check_file, check_folder  # noqa: F401
from layerskip_recipes.errors import ConfigError

PACKAGE = Path(__file__).parents[1]


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


def check_text(key: str, value: Any, example: str) -> None:
    """Raises a ValueError unless value is text, and not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key}: {value!r} is not allowed. Allowed: text; for example {key}={example}")
