"""Shared by tests: last_line, run_command, run_tune."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import torch
from helpers import forks


def run_command(
    name: str, *args: str, cwd: Path, env: dict | None = None, timeout: int = 600, cold: bool = False
) -> subprocess.CompletedProcess:
    """`tune ARGS` or `layerskip ARGS` as a user types it, in the environment that runs the tests, without the hub.

    Args:
        name: of a script beside the interpreter, or the whole path of a Python script.
        env: variables beside those of this process; then it starts cold, as some are read at import.
        timeout: in seconds.
        cold: in a process of its own. Else in a fork of one that has imported all of it, which saves 5 seconds. Not
            where CUDA may be, which knows no forks.
    """
    command = [str(Path(sys.executable).parent / name), *args]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    if cold or env or sys.platform != "linux" or torch.cuda.is_available():
        return subprocess.run(
            [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    (done,) = forks.run(command, cwd, [environment], timeout)
    return done


def last_line(stderr: str) -> str:
    """What a process said last, but for what nanobind, of which torch is made, says of its own at the end of some."""
    return stderr.partition("\nnanobind: ")[0].strip().splitlines()[-1]


run_tune = functools.partial(run_command, "tune")
