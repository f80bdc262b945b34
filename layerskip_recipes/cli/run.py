"""A recipe's command line, and how a run ends after a mistake or an interruption."""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from layerskip_recipes.errors import ConfigError, first_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

# gloo's messages when another process has ended or the network is down.
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def logs_here(record: logging.LogRecord) -> bool:
    """Rank 0 logs everything, and the other ranks only errors, which rank 0 may not have."""
    return record.levelno >= logging.ERROR or int(os.environ.get("RANK", 0)) == 0


def build_recipe(recipe: "Callable[[DictConfig], Any]", name: str, description: str | None) -> Any:
    """Parse `--config NAME [key=value ...]` and construct the recipe, which checks the config."""
    # Imported here because the `layerskip` command does not need torch.
    from torchtune.utils import get_logger

    from layerskip_recipes.cli.configs import recipe_of
    from layerskip_recipes.config.loading import load_config

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name that `layerskip ls` lists")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides; ~key removes a key")
    args, unknown = parser.parse_known_intermixed_args()
    log = get_logger("INFO")
    log.addFilter(logs_here)
    if unknown:
        raise ConfigError(f"argument: {unknown[0]!r} is unknown. Allowed: --config NAME and overrides key=value")
    source = load_config(args.config, args.overrides)
    try:
        built = recipe(source)
    except ConfigError as e:
        fits = recipe_of(source)
        if fits == name or (fits, name) == ("layerskip_generate", "layerskip_serve"):
            raise
        raise ConfigError(*e.args, f"config: {args.config} looks like one for `tune run {fits}`") from e
    if chosen := ", ".join(f"{key}={value}" for key, value in built.cfg.chosen.items()):
        log.info(f"Chosen for this model and machine: {chosen}. Override any of them with key=value.")
    return built


def run_cli(main: Callable[[], None]) -> None:
    """Run a command. Print the lines of a ConfigError last on stderr, and exit with status 1."""
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


def _end_at_sigterm(*_: Any) -> NoReturn:
    """Signal handler: end as after an error, so that temporary folders are removed. A second SIGTERM ends at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(128 + signal.SIGTERM)


def _run(main: Callable[[], None]) -> None:
    # One of several processes may wait in a collective, where no handler runs, and torchrun would wait for it.
    handles = int(os.environ.get("WORLD_SIZE", 1)) == 1 and threading.current_thread() is threading.main_thread()
    if handles and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end_at_sigterm)
    try:
        main()
        sys.stdout.flush()
    except ConfigError as e:
        fail(e)
    except RuntimeError as e:
        if not ("gloo" in str(e) and any(lost in str(e) for lost in PEER_ENDED)):
            raise
        # Usually another rank printed the reason, and torchrun ends this rank during the sleep.
        time.sleep(2)
        print(f"RuntimeError: another process ended or cannot be reached: {first_line(e)}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of the pipe, such as `| head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit
        sys.exit(1)
    except KeyboardInterrupt:  # a recipe that has results to print catches it itself
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(error: ConfigError) -> NoReturn:
    """Print each mistake as one line on stderr and exit with status 1."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        # The first process prints mistakes that all processes find, and torchrun ends this one during the sleep.
        time.sleep(5)
    for mistake in error.args:
        print(f"ValueError: {' '.join(str(mistake).split())}", file=sys.stderr)
    sys.exit(1)
