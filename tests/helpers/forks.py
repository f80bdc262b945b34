"""Commands in forks of a process that has imported everything: each start would import for 5 seconds.

    (done,) = run(["/usr/bin/tune", "ls"], tmp_path, [os.environ])           # as `python /usr/bin/tune ls`
    ranks = run(["ranks.py"], tmp_path, [env | {"RANK": r} for r in "01"])   # two at the same time

Torch has not computed in that process, and it has started no thread of Python. What is read from the environment at
import is as it was for the first command.
"""

import faulthandler
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["helpers.preloaded"])


def run(
    command: Sequence[str], cwd: Path, environments: Sequence[Mapping[str, str]], timeout: int = 600
) -> list[subprocess.CompletedProcess]:
    """A Python script with its arguments, once with each environment, all at the same time.

    Raises:
        subprocess.TimeoutExpired: if one of them takes more than so many seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(f"{folder}/{number}.out", f"{folder}/{number}.err") for number in range(len(environments))]
        jobs = zip(environments, outputs, strict=True)
        forks = [processes.Process(target=become, args=(command, cwd, dict(env), files)) for env, files in jobs]
        for fork in forks:
            fork.start()
        for fork in forks:
            fork.join(timeout)
        late = [fork for fork in forks if fork.is_alive()]
        for fork in late:
            fork.kill()
        said = [[Path(file).read_text() for file in files] for files in outputs]
    if late:
        raise subprocess.TimeoutExpired(command, timeout, *said[forks.index(late[0])])
    return [subprocess.CompletedProcess(command, f.exitcode, *texts) for f, texts in zip(forks, said, strict=True)]


def become(command: Sequence[str], cwd: Path, environment: dict[str, str], files: tuple[str, str]) -> None:
    """Run the command in this fork, with that folder, environment and files for its output."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["numpy"].random.seed()  # from the system, as at its import
    faulthandler.enable()  # a crash in C++ says where, on the new standard error
    sys.path[0], sys.argv = str(Path(command[0]).parent), list(command)
    runpy.run_path(command[0], run_name="__main__")
