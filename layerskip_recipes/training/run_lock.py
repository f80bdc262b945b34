"""RunLock: at most one training at a time writes to an output folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from torchtune.utils import get_logger

from layerskip_recipes.errors import ConfigError, first_line
from layerskip_recipes.processes import is_rank_zero

log = get_logger("INFO")
RUNNING = ".running"  # in output_dir while a training holds it; its text says which one

_held: dict[tuple[int, Path], "RunLock"] = {}  # by process, since a fork inherits this, and folder


class RunLock:
    """Rank 0's exclusive lock on a run's `output_dir`, from the first look at its checkpoints to the end.

    The operating system frees the lock when its process ends, however it ends: a file that was left behind locks
    nothing. A process may take its own lock again, for example in a notebook after an error.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._file: IO[str] | None = None
        self._created: list[Path] = []
        if is_rank_zero():
            holder = _held.get(self._key)
            if holder is not None and holder._is_current(holder._file):
                self._file, self._created, holder._file = holder._file, holder._created, None
            else:
                self._acquire()
            _held[self._key] = self

    @property
    def _key(self) -> tuple[int, Path]:
        return os.getpid(), self.folder.resolve()

    def _acquire(self) -> None:
        self._created = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = (self.folder / RUNNING).open("a+")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:  # a refused run has just removed the folder that it had created
                continue
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "which has just started"
                raise ConfigError(
                    f"output_dir: {str(self.folder)!r} is in use by another training, {holder}. Allowed: another "
                    f"folder, or the same one once that training has ended; for example output_dir={self.folder}_2"
                ) from None
            except OSError as e:
                log.warning(f"output_dir: cannot be locked ({first_line(e)}). Start no other training there meanwhile")
                (self.folder / RUNNING).unlink(missing_ok=True)
                return
            if self._is_current(file):
                break
            file.close()  # of a run that has ended since
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        self._file = file

    def _is_current(self, file: IO[str] | None) -> bool:
        """Whether the folder's file is still the one that was opened."""
        with suppress(OSError):
            return file is not None and os.path.samestat(os.fstat(file.fileno()), (self.folder / RUNNING).stat())
        return False

    def release(self) -> None:
        """Free the lock. Folders that it created go too if nothing was written there."""
        if self._file is None:
            return
        if self._is_current(self._file):
            (self.folder / RUNNING).unlink()  # while it is locked
        self._file.close()
        self._file = None
        _held.pop(self._key, None)
        with suppress(OSError):
            for folder in self._created:
                folder.rmdir()

    @contextmanager
    def released_after_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release()
            raise
