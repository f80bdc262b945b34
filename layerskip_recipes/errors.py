"""ConfigError: a user's mistake, said in one line."""


class ConfigError(ValueError):
    """A setting, an argument or a file that cannot be used: the key, what was given, what is allowed, an example.

    The command line prints such an error as `ValueError: ...`, without a traceback, and ends with status 1. Any other
    exception is a defect and keeps its traceback.
    """


class UnknownKeyError(ConfigError):
    """A config has a key that its recipe does not know."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; of an error without one, its name."""
    return (str(error).strip() or repr(error)).splitlines()[0]
