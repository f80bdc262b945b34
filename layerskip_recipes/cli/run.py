"""Running a recipe: its command line, and a user's mistake as one line with exit status 1."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from layerskip_recipes.errors import ConfigError, first_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

# How gloo says that a process for which it waits has ended, or that the network to it is down.
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def logs_here(record: logging.LogRecord) -> bool:
    """Whether this process logs a record: rank 0 logs all, the others only errors, which rank 0 may not have."""
    return record.levelno >= logging.ERROR or int(os.environ.get("RANK", 0)) == 0


def build_recipe(recipe: "Callable[[DictConfig], Any]", name: str, description: str | None) -> Any:
    """Parse `--config NAME [key=value ...]` and construct the recipe, whose constructor checks all settings."""
    # The command `layerskip` imports this module too, and does without torch.
    from torchtune.utils import get_logger

    from layerskip_recipes.cli.configs import recipe_of
    from layerskip_recipes.config.loading import load_config

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name that `layerskip ls` lists")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides; ~key removes a key")
    args, unknown = parser.parse_known_args()
    log = get_logger("INFO")
    log.addFilter(logs_here)
    if unknown:
        raise ConfigError(f"argument: {unknown[0]!r} is unknown. Allowed: --config NAME and overrides key=value")
    source = load_config(args.config, args.overrides)
    try:
        built = recipe(source)
    except ConfigError as e:
        fits = recipe_of(source)
        if fits == name:
            raise
        raise ConfigError(*e.args, f"config: {args.config} looks like one for `tune run {fits}`") from e
    chosen = ", ".join(f"{key}={value}" for key, value in built.cfg.chosen.items())
    if chosen:
        log.info(f"Chosen for this model and machine: {chosen}. Any key=value of yours replaces its value.")
    return built


def run_cli(main: Callable[[], None]) -> None:
    """Run the main function of a command. A ConfigError becomes the last line on stderr and exit status 1."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        _run(main)
        return
    from layerskip_recipes.processes import exit_at_once

    status: Any = 0
    try:
        _run(main)
    except SystemExit as e:
        status = e.code or 0
    exit_at_once(status)


def _run(main: Callable[[], None]) -> None:
    try:
        main()
        sys.stdout.flush()
    except ConfigError as e:
        fail(e)
    except RuntimeError as e:
        if not ("gloo" in str(e) and any(lost in str(e) for lost in PEER_ENDED)):
            raise
        # Usually another rank has said why it ended, and torchrun ends this one before it says more.
        time.sleep(2)
        first = first_line(e)
        print(f"RuntimeError: another process ended or cannot be reached: {first}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of a pipe, such as `| head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        sys.exit(1)
    except KeyboardInterrupt:  # before there are figures to print: later, recipes catch it themselves
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(error: ConfigError) -> NoReturn:
    """Print each mistake as a line on stderr, the last ones there, and exit with status 1."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        # The first process says what all processes find, and torchrun ends this one meanwhile.
        time.sleep(5)
    for mistake in error.args:
        print(f"ValueError: {' '.join(str(mistake).split())}", file=sys.stderr)
    sys.exit(1)
