"""ConfigError: a user's mistakes, each said in one line."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any


class ConfigError(ValueError):
    """A setting, an argument or a file that cannot be used: the key, what was given, what is allowed, an example.

    Each argument is one mistake. The command line prints each on a line of its own as `ValueError: ...`, without a
    traceback, and ends with status 1. Any other exception is a defect and keeps its traceback.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def mistakes_of(check: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[str]:
    """The mistakes that a check finds: those that it yields, and those that it raises as a ConfigError."""
    try:
        result = check(*args, **kwargs)
        if inspect.isgenerator(result):
            yield from result
    except ConfigError as e:
        yield from map(str, e.args)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; of an error without one, its name."""
    return (str(error).strip() or repr(error)).splitlines()[0]
