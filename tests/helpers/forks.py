"""Commands in forks of a process that has imported everything: each start would import for 5 seconds.

    (done,) = run(["/usr/bin/tune", "ls"], tmp_path, [os.environ])              # as `python /usr/bin/tune ls`
    ranks = run(["-m", "module"], tmp_path, [env | {"RANK": r} for r in "01"])  # two at the same time

A fork finds what a new process finds: the server, which is this file too, has done nothing but imports. Torch has not
computed in it, and its one thread beside the main one is of an allocator (jemalloc) that knows forks. What is read from
the environment at import is as the server has it.
"""

import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

# What the commands import. Their entry modules are run, so they are not here; nor is inductor, which starts threads.
MODULES = (
    "numpy",
    "scipy.io",  # by datasets, when it reads a file
    "matplotlib.figure",
    "pytest",
    "torchtune._cli.tune",
    "layerskip_recipes.cli.commands",
    "layerskip_recipes.training.recipe",
    "layerskip_recipes.generation.recipe",
    "layerskip_recipes.evaluation.recipe",
    "layerskip_recipes.benchmark.recipe",
)


@functools.cache
def server() -> tuple[Connection, subprocess.Popen]:
    """Of this test process; it ends when nobody holds the connection any more."""
    ours, theirs = multiprocessing.Pipe()
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    theirs.close()
    return ours, process


def run(
    command: Sequence[str], cwd: Path, environments: Sequence[Mapping[str, str]], timeout: int = 600
) -> list[subprocess.CompletedProcess]:
    """A command of `python`, a script or -m and a module, once with each environment, all at the same time.

    Raises:
        subprocess.TimeoutExpired: if one of them takes more than so many seconds.
    """
    connection, _ = server()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            {
                "command": list(command),
                "cwd": str(cwd),
                "environment": dict(environment),
                "timeout": timeout,
                "said": (f"{folder}/{number}.out", f"{folder}/{number}.err"),
            }
            for number, environment in enumerate(environments)
        ]
        connection.send(jobs)
        codes = connection.recv()
        said = [[Path(file).read_text() for file in job["said"]] for job in jobs]
    if -signal.SIGALRM in codes:
        raise subprocess.TimeoutExpired(command, timeout, *said[codes.index(-signal.SIGALRM)])
    return [subprocess.CompletedProcess(command, code, *texts) for code, texts in zip(codes, said, strict=True)]


# ---------------------------------------------------------------------------------------------------------- the server


def serve(connection: Connection) -> list[str]:
    """Fork for each job and send the exit codes. Returns in the forks: the command to run."""
    for module in MODULES:
        importlib.import_module(module)
    measure_little_memory()
    gc.freeze()  # a fork that ends looks through what it has made itself
    while True:
        try:
            jobs = connection.recv()
        except EOFError:
            sys.exit()
        forks = []
        for job in jobs:
            forks.append(os.fork())
            if forks[-1] == 0:
                connection.close()
                begin(job)
                return job["command"]
        connection.send([os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks])


def measure_little_memory() -> None:
    """The memory's speed, which each report has, by 8 MB instead of 256, which take a quarter of a second."""
    stats = importlib.import_module("layerskip_recipes.generation.stats")
    plain = stats.memory_bandwidth.__wrapped__  # without the decorator
    plain.__defaults__ = (8, *plain.__defaults__[1:])


def begin(job: Mapping) -> None:
    """Give this process the folder, the environment and the output of the job."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, file in enumerate(job["said"], start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.modules["numpy"].random.seed()  # from the system, as at its import
    faulthandler.enable()  # a crash in C++ says where, on the new standard error
    signal.alarm(job["timeout"])  # ends the process


if __name__ == "__main__":
    target, *arguments = serve(Connection(int(sys.argv[1])))
    if target == "-m":
        sys.path[0], sys.argv = os.getcwd(), arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(target).parent), [target, *arguments]
        runpy.run_path(target, run_name="__main__")
