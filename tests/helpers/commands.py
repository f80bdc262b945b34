"""Commands as a user types them."""

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
    """`tune ARGS`, `layerskip ARGS` or a Python script as a user types it, without the hub.

    In a fork of a process that has imported all of it, which saves 5 seconds; cold in one of its own, as with other
    variables, of which some are read at import, and where CUDA may be, which knows no forks.
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
