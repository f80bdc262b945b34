"""Commands as a user types them, in forks of the test's own process: a new Python imports for five seconds."""

import faulthandler
import functools
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torchtune._cli.tune  # noqa: F401  500 modules, which each fork would import again

FORK = multiprocessing.get_context("fork")


def run_forks(
    function: Callable[[], object], cwd: Path, environments: Sequence[Mapping[str, str]], timeout: int = 400
) -> list[subprocess.CompletedProcess]:
    """Call a function in one fork for each environment, all at the same time. What an exception says is on stderr.

    Raises:
        subprocess.TimeoutExpired: if a fork takes more than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"{n}.out"), Path(folder, f"{n}.err")) for n in range(len(environments))]
        jobs = zip(environments, outputs, strict=True)
        forks = [FORK.Process(target=_become, args=(function, cwd, dict(env), files)) for env, files in jobs]
        for fork in forks:
            fork.start()
        for fork in forks:
            fork.join(timeout)
        late = [number for number, fork in enumerate(forks) if fork.is_alive()]
        for number in late:
            forks[number].kill()
        texts = [[file.read_text() for file in files] for files in outputs]
    if late:
        raise subprocess.TimeoutExpired("a fork", timeout, *texts[late[0]])
    done = zip(forks, texts, strict=True)
    return [subprocess.CompletedProcess("a fork", fork.exitcode, *text) for fork, text in done]


def _become(function: Callable[[], object], cwd: Path, environment: dict[str, str], files: Sequence[Path]) -> None:
    """Call the function in this fork, with that folder, environment and files for its output."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()  # pytest's, and those that write where it reads
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # from the system, as at its import
    faulthandler.enable()  # a crash in C++ says where, on the new standard error
    function()


def script(path: Path | str, *args: object) -> Callable[[], object]:
    """`python PATH ARGS` as a function for `run_forks`."""

    def run() -> None:
        sys.path[0], sys.argv = str(Path(path).parent), [str(path), *map(str, args)]
        runpy.run_path(str(path), run_name="__main__")

    return run


def run_command(
    name: str, *args: str, cwd: Path, env: dict | None = None, timeout: int = 600
) -> subprocess.CompletedProcess:
    """`tune ARGS`, `layerskip ARGS` or a Python script as a user types it, without the hub.

    With `env` in a process of its own, since some variables are read at import, and where CUDA may be, which knows no
    forks.
    """
    path = Path(sys.executable).parent / name
    if env or sys.platform != "linux" or torch.cuda.is_available():
        return subprocess.run(
            [sys.executable, str(path), *args], cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True,
            timeout=timeout, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    (done,) = run_forks(script(path, *args), cwd, [os.environ], timeout)
    return done


def last_line(stderr: str) -> str:
    """What a process said last, but for what nanobind, of which torch is made, says of its own at the end of some."""
    return stderr.partition("\nnanobind: ")[0].strip().splitlines()[-1]


run_tune = functools.partial(run_command, "tune")
