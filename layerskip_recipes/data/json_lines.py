"""JSONL: files with a JSON object on each line."""

import gzip
import json
import os
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any, cast

from tqdm import tqdm

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.processes import is_rank_zero

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line.encode())  # which refuses surrogates
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_json_lines(content: str) -> dict[int, dict[str, Any] | str]:
    """Map line number (from 1) to JSON object, or to the line's text if it holds no object; skips empty lines.

    The text may hold surrogates for bytes that are not UTF-8.
    """
    lines = {number: line for number, line in enumerate(content.split("\n"), 1) if line.strip()}
    objects = ((number, line, _parse(line)) for number, line in lines.items())
    return {number: line if value is None else value for number, line, value in objects}


def bad_line_message(line: str) -> str:
    return f'{line[:60]!r} is no JSON object in UTF-8, such as {{"name": "value"}}'


def read_json_lines(path: str, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file, or a compressed .gz file; reads only the lines that are taken."""
    with _opened(path, key) as file:
        for number, _, line in _lines(file):
            yield number, _object(line, number, path, key)


class JsonLines(Sequence):
    """`make(line number, object)` for each line of a JSONL file or .gz file, or for its first `count` lines.

    A line is read again at each use, so memory holds 24 bytes per line; the objects would take about ten times the size
    of the file. The constructor calls `make` for all of these lines, which finds a mistake at the start.
    """

    def __init__(
        self, path: str, key: str, make: Callable[[int, dict[str, Any]], Any], count: int | None = None
    ) -> None:
        self.path, self.key, self.make = path, key, make
        self._numbers, self._starts, self._lengths = array("Q"), array("Q"), array("Q")
        with _opened(path, key) as file:
            # Only a plain file can be read anywhere. Keep a copy of the lines of others.
            is_plain = not path.endswith(".gz") and file.seekable()
            self._file: IO[bytes] = open(path, "rb") if is_plain else tempfile.TemporaryFile()  # noqa: SIM115 (kept)
            shown = {"desc": f"reading {path}", "unit": " lines", "leave": False, "delay": 2}
            for number, start, line in tqdm(islice(_lines(file), count), **shown, disable=not is_rank_zero()):
                make(number, _object(line, number, path, key))
                if not is_plain:
                    start = self._file.tell()
                    self._file.write(line)
                self._numbers.append(number)
                self._starts.append(start)
                self._lengths.append(len(line))
            self._file.flush()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        number, start, length = self._numbers[index], self._starts[index], self._lengths[index]
        # Unlike seek and read, this works in several processes that share the open file.
        line = os.pread(self._file.fileno(), length, start)
        return self.make(number, _object(line, number, self.path, self.key))


@contextmanager
def _opened(path: str, key: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, or the unpacked bytes of a .gz file. A ConfigError if reading them fails."""
    try:
        with cast(IO[bytes], gzip.open(path) if path.endswith(".gz") else open(path, "rb")) as file:
            yield file
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as e:
        raise ConfigError(f"{key}: {path!r} cannot be read ({e}). Give a file with a JSON object on each line") from e


def _lines(file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset in bytes, line) of each line that is not empty, without a byte order mark."""
    start = 0
    for number, line in enumerate(file, 1):
        mark = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
        if line[mark:].strip():
            yield number, start + mark, line[mark:]
        start += len(line)


def _object(line: bytes, number: int, path: str, key: str) -> dict[str, Any]:
    text = line.decode().rstrip("\r\n")
    value = _parse(text)
    if value is None:
        raise ConfigError(f"{key}: {path!r} line {number}: {bad_line_message(text)}")
    return value
