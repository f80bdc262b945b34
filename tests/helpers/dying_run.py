"""A training that dies: `dying_run.py CALL CONFIG OVERRIDES`.

By SIGKILL, at the CALL-th step of writing checkpoints; a file that is written is left half. The name of what was
interrupted is all that it prints.
"""

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torchtune.training.checkpointing._checkpointer as torchtune_checkpointer
from torch.distributed.checkpoint import FileSystemWriter

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.training.recipe import LayerSkipFinetune


def die_at(call: int) -> None:
    """Wrap the functions by which checkpoints are written."""
    calls, stdout = itertools.count(1), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def wrap(owner, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            within_shards = name == "save" and not isinstance(args[1], str | Path)
            if within_shards or next(calls) != call:
                return function(*args, **kwargs)
            if name in ("save", "save_file"):
                function(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            if name == "rmtree" and Path(args[0]).exists():
                for file in [file for file in Path(args[0]).rglob("*") if file.is_file()][::2]:
                    file.unlink()
            if name == "write_data":
                function(*args, **kwargs).wait()
            os.write(stdout, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, wrapped)

    for owner, name in (
        (os, "rename"), (shutil, "rmtree"), (torch, "save"), (torchtune_checkpointer, "save_file"),
        (FileSystemWriter, "write_data"), (FileSystemWriter, "finish"),
    ):  # fmt: skip
        wrap(owner, name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    die_at(int(sys.argv[1]))
    recipe = LayerSkipFinetune(load_config(sys.argv[2], sys.argv[3:]))
    recipe.setup()
    recipe.train()
