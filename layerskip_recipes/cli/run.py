"""Running a recipe: its command line, and a user's mistake as one line with exit status 1."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from omegaconf import DictConfig
from torchtune import utils

from layerskip_recipes.config.loading import (
    load_config,
)
from layerskip_recipes.errors import ConfigError


def is_for_all(record: logging.LogRecord) -> bool:
    """Whether a process logs a record: the first one does, others errors only, which they may have alone."""
    return record.levelno >= logging.ERROR or int(os.environ.get("RANK", 0)) == 0


def build_recipe(recipe: Callable[[DictConfig], Any], description: str) -> Any:
    """Parse `--config NAME [key=value ...]` and construct the recipe, whose constructor checks all settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name that `layerskip ls` lists")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides; ~key removes a key")
    args, unknown = parser.parse_known_args()
    utils.get_logger("INFO").addFilter(is_for_all)
    if unknown:
        raise ConfigError(f"argument: {unknown[0]!r} is unknown. Allowed: --config NAME and overrides key=value")
    cfg = load_config(args.config, args.overrides)
    try:
        return recipe(cfg)
    except ValueError as e:
        from layerskip_recipes.cli.commands import recipe_of  # which imports all of them

        meant, own = recipe_of(cfg), f"layerskip_{recipe.__name__.removeprefix('LayerSkip').lower()}"
        if isinstance(e, ConfigError) and ": unknown key. " in str(e) and meant != own:
            raise ConfigError(f"{e}. The config looks like one for `tune run {meant}`") from e
        raise


# What gloo says where a process that it waits for is no more, or the network to it; which is a matter of what was
# under way.
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def main_of(steps: Callable[[], None]) -> None:
    """Run a recipe's main. A user's mistake becomes one last line on stderr and exit status 1, without a traceback.

    A ValueError raised by this package is a user's mistake; any other exception is not, and keeps its traceback.
    """
    try:
        steps()
        sys.stdout.flush()
    except ValueError as e:
        if not isinstance(e, ConfigError):
            raise
        fail(e)
    except RuntimeError as e:
        if not ("gloo" in str(e) and any(lost in str(e) for lost in PEER_ENDED)):
            raise
        # The usual case: another rank said why it ended, and torchrun ends this one before it says more.
        time.sleep(2)
        first = str(e).splitlines()[0]
        print(f"RuntimeError: another process ended or cannot be reached: {first}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written at the end
        sys.exit(1)
    except KeyboardInterrupt:  # while it loads, say; where there are figures to print, recipes stop by themselves
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(error: ValueError) -> NoReturn:
    """Print the error as the last line on stderr and exit with status 1."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        # A mistake that all processes find is said by the first one, and torchrun ends this one meanwhile.
        time.sleep(5)
    print(f"ValueError: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(1)
