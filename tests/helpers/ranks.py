"""Several processes with the environment that torchrun gives them, as forks of the test's own process."""

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.commands import run_forks, script

from layerskip_recipes.processes import end_processes, init_processes


def free_port() -> int:
    """A port below 32768, where the kernel begins to give ports away: until rank 0 listens, no connection takes it.

    Test processes, whose numbers are close together, begin to search at different ports.
    """
    for port in range(20000 + 16 * os.getpid() % 12000, 32768):
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise OSError("no free port from 20000 to 32767")


def run_on_ranks(function: Callable[[], object], cwd: Path, processes: int = 2) -> list[subprocess.CompletedProcess]:
    """Call a function on so many ranks at the same time; they have not joined a process group yet."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    with pytest.MonkeyPatch.context() as patch:
        # A rank waits seconds before it says what it found, so that torchrun can end it.
        patch.setattr("layerskip_recipes.cli.run.time", SimpleNamespace(sleep=lambda seconds: None))
        return run_forks(function, cwd, ranks)


def check_success(ranks: list[subprocess.CompletedProcess]) -> None:
    said = "\n".join(rank.stdout + rank.stderr for rank in ranks)
    assert {rank.returncode for rank in ranks} == {0}, said[-4000:]


def on_ranks(processes: int = 2) -> Callable:
    """Marks a test that runs on so many gloo ranks, all of which must pass.

    Its fixtures are made before, in one process, and so are what they and the test's module hold.
    """

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            def on_one_rank() -> None:
                init_processes("cpu")
                test(**fixtures)
                end_processes()

            check_success(run_on_ranks(on_one_rank, Path.cwd(), processes))

        return run

    return decorate


def run_tune_on_ranks(*words: str, cwd: Path) -> list[subprocess.CompletedProcess]:
    """`tune --nproc_per_node 2 WORDS` without torchrun, whose start takes longer than most runs."""
    return run_on_ranks(script(Path(sys.executable).with_name("tune"), *words), cwd)


def train_on_ranks(path: Path, *overrides: Any, processes: int = 2) -> None:
    """`tune run layerskip_finetune --config PATH OVERRIDES` on so many processes."""
    tune = script(Path(sys.executable).with_name("tune"), "run", "layerskip_finetune", "--config", path, *overrides)
    check_success(run_on_ranks(tune, path.parent, processes))
