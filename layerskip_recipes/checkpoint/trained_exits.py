"""layerskip.json: layerskip_finetune's notes on a checkpoint's exits, used to choose a draft model.

    {
      "exits": [6, 12, 30],                             trained exits; more keys describe their training
      "vocabulary": [198, 11, ...],                     label tokens of the training data, most frequent first
      "measured": {
        "on": "dataset_val", "labels": 20480,
        "exits": {"6": {"all": {"greedy": [1.69, 2.2, ...], "sampled": [1.63, ...], "ended": ...}, "2048": ...}}
      }
    }

For a trained draft (drafts.py), "measured" has {"draft": {"greedy": ..., "sampled": ...}} and there are no exits.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from layerskip_recipes.errors import ConfigError, first_line

DESCRIPTION = "layerskip.json"
MOST_TOKENS = 16384  # maximum length of "vocabulary"
DRAFT_VOCABULARIES = (512, 1024, 2048, 4096, 8192, MOST_TOKENS)
LONGEST_DRAFT = 8  # the longest draft that is measured: with AVX-512 verification is much slower from 10 rows on

Rates = Annotated[list[Annotated[float, Field(ge=1)]], Field(min_length=1)]


class EndedDrafts(BaseModel):
    """Tokens per round, and drafted tokens, for drafts of at most 1, 2, .. tokens that end at low confidence."""

    greedy: list[tuple[float, float]]
    sampled: list[tuple[float, float]]


class TokensPerRound(BaseModel):
    """Expected tokens per round for drafts of 1, 2, .. tokens, teacher-forced (exit_quality.expected_rounds).

    They include the token after the accepted ones.
    """

    greedy: Rates
    sampled: Rates
    """At temperature 1."""
    ended: EndedDrafts | None = None
    """None: not measured."""


class Measured(BaseModel):
    on: Literal["dataset_val", "training"]
    labels: int
    exits: dict[int, dict[str, TokensPerRound]] = {}
    """For each early exit and draft vocabulary: "all", or n for the first n tokens of `vocabulary`."""
    draft: TokensPerRound | None = None
    """For a trained draft, with its own vocabulary."""


class TrainedExits(BaseModel):
    """The content of layerskip.json."""

    exits: list[int] | None = None
    """The exits with a loss, in order."""
    vocabulary: list[int] | None = None
    """Label tokens of the training data, most frequent first."""
    measured: Measured | None = None


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    (folder / DESCRIPTION).write_text(_readable(dict(description)) + "\n", encoding="utf-8")


def _readable(value: Any, indent: str = "") -> str:
    """JSON with one key per line and lists on one line."""
    if not isinstance(value, dict) or not value or not any(isinstance(part, dict | list) for part in value.values()):
        return json.dumps(value)
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(str(key))}: {_readable(part, inner)}" for key, part in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def read_trained_exits(folder: Path) -> TrainedExits | None:
    """Read a folder's layerskip.json; None without the file."""
    file = folder / DESCRIPTION
    if not file.is_file():
        return None
    try:
        return TrainedExits.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as e:
        wrong = e.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        why = f"{place}: {wrong['msg']}" if place else wrong["msg"]
    except (OSError, UnicodeDecodeError) as e:
        why = first_line(e)
    raise ConfigError(f"{str(file)!r} cannot be read ({why}). It describes the trained exits: delete or repair it")


def usual_exit(num_layers: int) -> int:
    """The exit at a seventh of the depth, which is trained by default; a fifth was slower (docs/lab_notes.md)."""
    return max(round(num_layers / 7), 1)


def exits_to_measure(trained: Sequence[int], num_layers: int) -> list[int]:
    """The trained early exits; if more than four, the exits nearest to 1/8, 2/8, 3/8 and 4/8 of the depth."""
    early = sorted(e for e in trained if e < num_layers)
    if len(early) <= 4:
        return early
    return sorted({min(early, key=lambda e: abs(e - part * num_layers / 8)) for part in (1, 2, 3, 4)})


def exit_that_drafts(trained: Sequence[int], num_layers: int) -> int | None:
    """The trained early exit nearest to a quarter of the depth, as in the paper; None if no early exit is trained."""
    early = [e for e in trained if e < num_layers]
    return min(early, key=lambda e: (abs(e - num_layers / 4), e), default=None)
