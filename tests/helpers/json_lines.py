"""JSON and JSONL files, and tasks over them as a config names them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerskip_recipes.config.components import Component


def write_lines(file: Path | str, rows: Iterable[Any]) -> str:
    """A JSONL file of these rows; returns its path."""
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def change_json(file: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def task_component(task: str, **arguments: Any) -> Component:
    """The `prompts` of a config that come from a task."""
    return Component({"_component_": f"layerskip_recipes.tasks.{task}", **arguments}, "prompts")
