"""ConfigError: a user's mistakes, one line each."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any


class ConfigError(ValueError):
    """A user's mistakes, one message per argument: the key, the given value, what is allowed, an example.

    The command line prints each as a line `ValueError: ...` without a traceback, and exits with status 1. Any other
    exception is a bug and keeps its traceback.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def mistakes_of(check: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[str]:
    """The messages that a check yields or raises as a ConfigError."""
    try:
        result = check(*args, **kwargs)
        if inspect.isgenerator(result):
            yield from result
    except ConfigError as e:
        yield from map(str, e.args)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its repr if the message is empty."""
    return (str(error).strip() or repr(error)).splitlines()[0]
