"""JSONL: files with a JSON object on each line."""

import gzip
import json
import zlib
from typing import Any

from layerskip_recipes.errors import ConfigError


def parse_json_lines(content: str) -> dict[int, dict[str, Any] | str]:
    """Map line number (from 1) to JSON object, or to the line's text if it holds no object; skips empty lines.

    The text may hold surrogates for bytes that are not UTF-8.
    """
    objects: dict[int, dict[str, Any] | str] = {}
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.encode())
        except (ValueError, RecursionError):
            found = None
        objects[number] = found if isinstance(found, dict) else line
    return objects


def bad_line_message(line: str) -> str:
    return f'{line[:60]!r} is no JSON object in UTF-8, such as {{"prompt": "text"}}'


def read_json_lines(path: str, key: str) -> dict[int, dict[str, Any]]:
    """Map line number to JSON object for a JSONL file, or a compressed .gz file."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            content = file.read()
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as e:
        raise ConfigError(f"{key}: {path!r} cannot be read ({e}). Give a file with a JSON object on each line") from e
    objects: dict[int, dict[str, Any]] = {}
    for number, line in parse_json_lines(content).items():
        if not isinstance(line, dict):
            raise ConfigError(f"{key}: {path!r} line {number}: {bad_line_message(line)}")
        objects[number] = line
    return objects
