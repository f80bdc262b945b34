"""JSONL files, and tasks over them as a config names them."""

import json
from pathlib import Path
from typing import Any

from layerskip_recipes.config.components import Component


def write_lines(name: str, rows: list[dict]) -> str:
    """A JSONL file of that name; returns the name."""
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def task_component(task: str, **arguments: Any) -> Component:
    """The `prompts` of a config that come from a task."""
    return Component({"_component_": f"layerskip_recipes.tasks.{task}", **arguments}, "prompts")
