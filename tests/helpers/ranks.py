"""Several processes as torchrun starts them, as forks of one that has imported everything: see forks.py."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import forks


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


def run_on_ranks(
    script: str, *arguments: Any, cwd: Path, processes: int = 2, timeout: int = 400
) -> list[subprocess.CompletedProcess]:
    """`python SCRIPT ARGUMENTS` on so many ranks at the same time, with the environment that torchrun gives them."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "HF_HUB_OFFLINE": "1"}
    ranks = [os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return forks.run([script, *map(str, arguments)], cwd, ranks, timeout)


def run_tune_on_ranks(*words: str, cwd: Path) -> list[subprocess.CompletedProcess]:
    """`tune --nproc_per_node 2 WORDS` without torchrun, whose start takes longer than most runs."""
    return run_on_ranks(str(Path(sys.executable).with_name("tune")), *words, cwd=cwd)


def check_success(ranks: list[subprocess.CompletedProcess]) -> None:
    said = "\n".join(rank.stdout + rank.stderr for rank in ranks)
    assert {rank.returncode for rank in ranks} == {0}, said[-4000:]


def train_on_ranks(path: Path, *overrides: Any, processes: int = 2) -> None:
    """`tune run layerskip_finetune --config PATH OVERRIDES` on so many processes."""
    script = str(Path(__file__).with_name("training_ranks.py"))
    arguments = ("train", path.parent, "--config", path, *overrides)
    check_success(run_on_ranks(script, *arguments, cwd=path.parent, processes=processes))
