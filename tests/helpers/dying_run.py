"""A training that dies: `dying_run.py CALL CONFIG OVERRIDES` or `dying_run.py SIGNAL CONFIG OVERRIDES`.

By SIGKILL, at the CALL-th step of writing checkpoints; a file that is written is left half. The name of what was
interrupted is all that it prints. Or by the signal, after its first checkpoint.
"""

import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torchtune.training.checkpointing._checkpointer as torchtune_checkpointer
from torch.distributed.checkpoint import FileSystemWriter

from layerskip_recipes.cli.recipes import finetune
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


def signal_after(checkpoint: Path, number: int) -> None:
    while not checkpoint.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    torch.set_num_threads(1)
    when, config, *overrides = sys.argv[1:]
    if when.isdigit():
        die_at(int(when))
        recipe = LayerSkipFinetune(load_config(config, overrides))
        recipe.setup()
        recipe.train()
    else:
        tempfile.tempdir = None  # of the environment
        arguments = Path(load_config(config, overrides).output_dir) / "epoch_0", getattr(signal, when)
        threading.Thread(target=signal_after, args=arguments, daemon=True).start()
        sys.argv = ["layerskip_finetune", "--config", config, *overrides]
        finetune()
