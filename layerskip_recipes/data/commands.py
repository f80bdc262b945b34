"""Spoken commands and their parses in the style of TOPv2: a narrow task for finetuning that needs no download.

    command: play golden rivers by amy
    parse:   [IN:PLAY_MUSIC play [SL:MUSIC_TRACK_TITLE golden rivers ] by [SL:MUSIC_ARTIST_NAME amy ] ]

A command is its parse without the brackets, which mark intents (IN) and slots (SL). The grammar is in
commands.yaml. Every template has a slot whose test values never occur in training. In training, two fifths of these
slots have a word that does not belong there: one of a list, or an invented one. So a model learns to copy any word.
"""

import random
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import Field

from layerskip_recipes.config.schema import PositiveInt, checked_arguments
from layerskip_recipes.data.replies import Example, ReplyDataset

Split = Literal["train", "test"]

_GRAMMAR = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TEMPLATES: dict[str, list[str]] = _GRAMMAR["templates"]  # by domain
VALUES: dict[str, Any] = _GRAMMAR["values"]  # by name: a list, or {"train": list, "test": list}
HELD_OUT = {
    word for values in VALUES.values() if isinstance(values, dict) for value in values["test"] for word in value.split()
}


def _other_word(rng: random.Random) -> str:
    """A word of the list, or an invented one; never one of the test values."""
    if rng.random() < 0.5:
        word = rng.choice(_GRAMMAR["words"])
    else:
        starts, ends = _GRAMMAR["syllables"].values()
        word = "".join(rng.choice(starts) + rng.choice("aeiou") for _ in range(rng.randint(1, 3))) + rng.choice(ends)
    return _other_word(rng) if word in HELD_OUT else word


def _parse(rng: random.Random, split: Split) -> str:
    """Fill a random template."""

    def fill(match: re.Match) -> str:
        inline, name = match.groups()
        choices = VALUES[name] if inline is None else inline.split("|")
        if isinstance(choices, list):
            return rng.choice(choices)
        words = rng.choice(choices[split]).split()
        if split == "train" and rng.random() < 0.4:
            words[rng.randrange(len(words))] = _other_word(rng)
        return " ".join(words)

    text = rng.choice(rng.choice([*TEMPLATES.values()]))
    while (filled := re.sub(r"\((.*?)\)|\{(\w+)\}", fill, text)) != text:  # phrases contain further placeholders
        text = filled
    return " ".join(text.split())


@checked_arguments("prompts.")
def commands(
    count: Annotated[PositiveInt, Field(examples=[24])] = 24, split: Split = "test", seed: int = 0
) -> list[Example]:
    """Distinct commands as prompts, with their parses as references; the same on every machine.

    A smaller `count` gives a prefix of the same list. The split "test" has slot values that "train" never shows.
    """
    rng = random.Random(f"{split} {seed}")
    parses: dict[str, str] = {}  # by command
    while len(parses) < count:
        parse = _parse(rng, split)
        parses[" ".join(re.sub(r"\[\S+|\]", " ", parse).split())] = parse
    return [{"prompt": {"user": command}, "response": parse} for command, parse in parses.items()]


@checked_arguments("dataset.")
def command_dataset(
    tokenizer: Any,
    split: Split = "train",
    count: Annotated[PositiveInt, Field(examples=[40000])] = 40_000,
    seed: int = 0,
) -> ReplyDataset:
    """`commands` as conversations in the tokenizer's chat template; the loss counts the parses."""
    return ReplyDataset(tokenizer, commands(count, split, seed))
