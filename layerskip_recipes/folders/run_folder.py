"""The checkpoints in a run's folder: which are complete, which are intact, and which is the newest."""

import errno
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torchtune import utils

log = utils.get_logger("INFO")
RECIPE_STATE = "recipe_state.pt"
DRAFT_FILE = "draft.safetensors"
WRITTEN = "written"  # a JSON file: the time of writing in seconds, which copying a folder loses, and the file sizes
SIZED = (".safetensors", ".pt", ".bin", ".distcp")


def mark_complete(checkpoint: Path, time: float) -> None:
    """Record when a checkpoint was written, make it readable for others, and flush all of it to the disk."""
    files = [file for file in checkpoint.rglob("*") if file.suffix in SIZED or file.name == ".metadata"]
    sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in files}
    (checkpoint / WRITTEN).write_text(json.dumps({"time": time, "sizes": sizes}))
    flush(checkpoint)


def flush(folder: Path) -> None:
    """Flush a new folder of files to the disk, and give its files the mode of new files.

    safetensors writes files that only their owner can read.
    """
    (folder / ".mode").touch()
    mode = (folder / ".mode").stat().st_mode
    (folder / ".mode").unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # a file system without modes
                path.chmod(mode & 0o777)
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk: otherwise a power loss can empty it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if not path.is_dir() or e.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise  # some file systems cannot sync folders
    finally:
        os.close(descriptor)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints under output_dir, oldest first."""
    return sorted(filter(written_at, _folders(output_dir)), key=written_at)


def _folders(output_dir: Path) -> list[Path]:
    return [file.parent for unit in ("epoch", "step") for file in output_dir.glob(f"{unit}_*/{WRITTEN}")]


def written_at(checkpoint: Path) -> float:
    """When a checkpoint was written, in seconds; 0 if unknown, which means that it is incomplete."""
    try:
        return float(json.loads((checkpoint / WRITTEN).read_text())["time"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0.0


def newest_intact(output_dir: Path, needs: str = RECIPE_STATE) -> Path | None:
    """The newest undamaged checkpoint that has the file `needs`. Logs each newer one that is damaged."""
    # Incomplete ones first, whose time is 0.
    for checkpoint in sorted(_folders(output_dir), key=lambda folder: written_at(folder) or torch.inf, reverse=True):
        if (checkpoint / needs).exists():
            why = damage(checkpoint)
            if why is None:
                return checkpoint
            _warn(f"{checkpoint} is damaged and not used: {why}")
    return None


@cache
def _warn(message: str) -> None:
    log.warning(message)  # once, although a config names the same folder several times


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, for example after a power loss; None if they are intact."""
    name = WRITTEN
    try:
        for name, size in json.loads((checkpoint / WRITTEN).read_text())["sizes"].items():
            actual = (checkpoint / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
        for file in sorted(checkpoint.rglob("*")):
            name = str(file.relative_to(checkpoint))
            _open(file)
    except FileNotFoundError:
        return f"{name} is missing"
    except Exception as e:  # each library has its own errors
        return f"{name} cannot be read ({type(e).__name__})"
    return None


def _open(file: Path) -> None:
    """Read a file's structure, but not its tensors."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass
    elif file.suffix in (".pt", ".bin"):
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    elif file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
