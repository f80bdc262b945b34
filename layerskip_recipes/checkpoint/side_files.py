"""SideFiles: the small files beside a model's weights, such as config and tokenizer."""

from collections.abc import Iterable
from pathlib import Path

from torchtune.training.checkpointing._utils import SUFFIXES_TO_NOT_COPY
from torchtune.utils import get_logger

from layerskip_recipes.checkpoint.answers import ANSWERS_FILE
from layerskip_recipes.errors import first_line

log = get_logger("INFO")
LARGEST = 100 * 2**20  # as in torchtune
NOT_COPIED = ("adapter_config.json", ANSWERS_FILE, *SUFFIXES_TO_NOT_COPY)


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
    visible = (file for file in folder.rglob("*") if "/." not in f"/{file.relative_to(folder).as_posix()}")
    return [file for file in visible if not file.name.endswith(NOT_COPIED)]
