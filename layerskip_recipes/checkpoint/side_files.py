"""SideFiles: the small files beside a model's weights, such as config and tokenizer."""

import os
from collections.abc import Iterable
from pathlib import Path

from torchtune.training.checkpointing._utils import SUFFIXES_TO_NOT_COPY
from torchtune.utils import get_logger

from layerskip_recipes.errors import first_line

log = get_logger("INFO")
LARGEST = 100 * 2**20  # as in torchtune
NOT_COPIED = ("adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


class SideFiles:
    """Files of a model's folder, kept in memory: the folder may be changed or deleted before a checkpoint is saved."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.content: dict[Path, bytes] = {}
        for file in sorted({*files}):
            try:
                if not file.is_dir() and file.stat().st_size <= LARGEST:
                    self.content[file.relative_to(folder)] = file.read_bytes()
            except OSError as e:
                log.warning(f"{file} cannot be read ({first_line(e)}), so checkpoints will lack it")

    def write(self, folder: Path) -> None:
        """Write the files that the folder does not have yet."""
        for name, content in self.content.items():
            place = folder / name
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)


def files_of_torchtune(folder: Path) -> list[Path]:
    """The files that torchtune's checkpointers copy from a checkpoint's folder."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".") and name not in NOT_COPIED]
        found += [Path(place) / name for name in visible if not name.endswith(tuple(SUFFIXES_TO_NOT_COPY))]
    return found
