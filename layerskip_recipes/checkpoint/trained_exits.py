"""layerskip.json: what layerskip_finetune notes in each checkpoint about its exits, and which of them should draft."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip_recipes.errors import ConfigError

DESCRIPTION = "layerskip.json"  # of the trained exits, or of a draft (drafts.py)


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write the file into a checkpoint, over one that was copied from the checkpoint of the start."""
    (folder / DESCRIPTION).write_text(json.dumps(dict(description), indent=2) + "\n", encoding="utf-8")


def read_trained_exits(folder: Path) -> list[int] | None:
    """The exits that had a loss in the training of a folder's weights; None for a model without the file."""
    file = folder / DESCRIPTION
    if not file.is_file():
        return None
    try:
        exits = json.loads(file.read_text(encoding="utf-8")).get("exits")
        return None if exits is None else sorted(int(e) for e in exits)
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise ConfigError(f"{str(file)!r} cannot be read ({e}). It lists the trained exits: delete or repair it") from e


def exit_that_drafts(trained: Sequence[int], num_layers: int) -> int | None:
    """The trained exit nearest to a quarter of the depth, where the paper's models draft; the earlier one of two.

    None if only the last exit is trained.
    """
    early = [e for e in trained if e < num_layers]
    return min(early, key=lambda e: (abs(e - num_layers / 4), e), default=None)
