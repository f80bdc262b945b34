"""The files of the `qa/*` configs. The scripts beside this one import it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_splits(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]], what: str) -> None:
    """A file of JSON lines for each split, and a line on the screen that counts `what` is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{file}: {len(lines)} {what}")
