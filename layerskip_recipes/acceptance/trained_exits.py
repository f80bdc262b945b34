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
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from torchtune.utils import get_logger
from typing_extensions import Self

from layerskip_recipes.acceptance.tokens_per_round import ALL_TOKENS, StoredPart, TokensPerRound
from layerskip_recipes.config.layer_strings import default_exit
from layerskip_recipes.errors import ConfigError, first_line

log = get_logger("INFO")

DESCRIPTION = "layerskip.json"
MOST_TOKENS = 16384  # maximum length of "vocabulary"
DRAFT_VOCABULARIES = (512, 1024, 2048, 4096, 8192, MOST_TOKENS)
LONGEST_DRAFT = 15  # the longest draft that is measured: a round then verifies 16 tokens, the rows of a matrix tile

Exit = Annotated[int, Field(ge=1)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
VocabularyName = Annotated[str, Field(pattern=r"^(all|[1-9]\d{0,8})$")]


class Measured(StoredPart):
    on: Literal["dataset_val", "training"]
    labels: int
    exits: dict[Exit, dict[VocabularyName, TokensPerRound]] = Field(default_factory=dict)
    """For each early exit and draft vocabulary: "all", or n for the first n tokens of `vocabulary`."""
    draft: TokensPerRound | None = None
    """For a trained draft, with its own vocabulary."""

    @model_validator(mode="after")
    def _has_all_tokens(self) -> Self:
        for exit_layer, by_vocabulary in self.exits.items():
            if ALL_TOKENS not in by_vocabulary:
                raise ValueError(f"exit {exit_layer} has no {ALL_TOKENS!r}")
        return self


class TrainedExits(StoredPart):
    """The content of layerskip.json."""

    num_layers: int | None = None
    """The model's depth; earlier versions did not note it."""
    exits: list[Exit] | None = None
    """The exits with a loss, in order."""
    vocabulary: list[Token] | None = None
    """Label tokens of the training data, most frequent first."""
    measured: Measured | None = None

    def exit_that_drafts(self, num_layers: int) -> int | None:
        """The trained early exit that drafts if none was measured; None if no early exit is trained."""
        early = [e for e in self.exits or [] if e < num_layers]
        return default_exit(num_layers, early) if early else None

    def fits(self, num_layers: int | None, num_tokens: int | None) -> bool:
        """Whether a model of this size has all exits and tokens that the file names."""
        exits = [*(self.exits or []), *(self.measured.exits if self.measured else [])]
        same_depth = None in (num_layers, self.num_layers) or self.num_layers == num_layers
        has_exits = num_layers is None or max(exits, default=0) <= num_layers
        return same_depth and has_exits and (num_tokens is None or max(self.vocabulary or [0]) < num_tokens)


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    (folder / DESCRIPTION).write_text(_readable(dict(description)) + "\n", encoding="utf-8")


def _readable(value: Any, indent: str = "") -> str:
    """JSON with one key per line and lists on one line."""
    if not isinstance(value, dict) or not value or not any(isinstance(part, dict | list) for part in value.values()):
        return json.dumps(value)
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(str(key))}: {_readable(part, inner)}" for key, part in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def read_trained_exits(
    folder: Path, num_layers: int | None = None, num_tokens: int | None = None
) -> TrainedExits | None:
    """Read a folder's layerskip.json; None without the file.

    None too, with a warning, if the file describes another model than the folder's, which has `num_layers` layers and
    `num_tokens` tokens; not checked if they are None.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        return None
    try:
        trained = TrainedExits.model_validate_json(file.read_text(encoding="utf-8"))
        if trained.fits(num_layers, num_tokens):
            return trained
        log.warning(
            f"{str(file)!r} is ignored: it describes another model ({num_layers} layers, {num_tokens} tokens here)"
        )
        return None
    except ValidationError as e:
        wrong = e.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        why = f"{place}: {wrong['msg']}" if place else wrong["msg"]
    except (OSError, UnicodeDecodeError) as e:
        why = first_line(e)
    raise ConfigError(f"{str(file)!r} cannot be read ({why}). It describes the trained exits: delete or repair it")
