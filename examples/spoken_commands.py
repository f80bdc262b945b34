"""Write train.jsonl and test.jsonl for the `qa/*` configs: spoken commands and their parses, in the style of TOPv2.

    python examples/spoken_commands.py commands

    input:  play golden rivers by amy
    output: [IN:PLAY_MUSIC play [SL:MUSIC_TRACK_TITLE golden rivers ] by [SL:MUSIC_ARTIST_NAME amy ] ]

The script generates the data, so it needs no download. A command is its parse without the brackets, which mark intents
(IN) and slots (SL). The grammar is in spoken_commands.yaml. Every template has a slot whose test values never occur in
training. In training, two fifths of these slots have a word that does not belong there: one of a list, or an invented
one. So a model learns to copy any word.
"""

import random
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from qa_files import write_splits

GRAMMAR = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TEMPLATES: dict[str, list[str]] = GRAMMAR["templates"]  # by domain
VALUES: dict[str, Any] = GRAMMAR["values"]  # by name: a list, or {"train": list, "test": list}
HELD_OUT = {
    word for values in VALUES.values() if isinstance(values, dict) for value in values["test"] for word in value.split()
}
COUNTS = {"train": 40_000, "test": 500}


def other_word(rng: random.Random) -> str:
    """A word of the list, or an invented one; never one of the test values."""
    if rng.random() < 0.5:
        word = rng.choice(GRAMMAR["words"])
    else:
        starts, ends = GRAMMAR["syllables"].values()
        word = "".join(rng.choice(starts) + rng.choice("aeiou") for _ in range(rng.randint(1, 3))) + rng.choice(ends)
    return other_word(rng) if word in HELD_OUT else word


def random_parse(rng: random.Random, split: str) -> str:
    """Fill a random template."""

    def fill(match: re.Match) -> str:
        inline, name = match.groups()
        choices = VALUES[name] if inline is None else inline.split("|")
        if isinstance(choices, list):
            return rng.choice(choices)
        words = rng.choice(choices[split]).split()
        if split == "train" and rng.random() < 0.4:
            words[rng.randrange(len(words))] = other_word(rng)
        return " ".join(words)

    text = rng.choice(rng.choice([*TEMPLATES.values()]))
    while (filled := re.sub(r"\((.*?)\)|\{(\w+)\}", fill, text)) != text:  # phrases contain further placeholders
        text = filled
    return " ".join(text.split())


def pairs(split: str, count: int) -> list[dict[str, str]]:
    """Distinct commands with their parses; the same on every machine. A smaller `count` gives a prefix of the list."""
    rng = random.Random(f"{split} 0")
    parses: dict[str, str] = {}  # by command
    while len(parses) < count:
        parse = random_parse(rng, split)
        parses[" ".join(re.sub(r"\[\S+|\]", " ", parse).split())] = parse
    return [{"input": command, "output": parse} for command, parse in parses.items()]


def main() -> None:
    splits = {split: pairs(split, count) for split, count in COUNTS.items()}
    write_splits(Path(sys.argv[1]), splits, "commands")


if __name__ == "__main__":
    main()
