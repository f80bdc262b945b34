"""Function calls: a narrow task from the public questions of the Berkeley Function Calling Leaderboard.

    system:  (how to answer, and a line of JSON for each function that the question offers)
    user:    How warm is it in Oslo, in Celsius?
    answer:  [{"name": "get_weather", "arguments": {"city": "Oslo", "unit": "celsius"}}]

The data are in the package bfcl-eval, which is not part of this project. The split is ours, so results are no score of
the leaderboard: about a sixth of the questions are for testing. No function that they offer is in a training question.
"""

import importlib.util
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torchtune import utils

from layerskip_recipes.config.schema import PositiveInt, Text, checked_arguments
from layerskip_recipes.data.json_lines import read_json_lines
from layerskip_recipes.data.replies import Example, ReplyDataset
from layerskip_recipes.errors import ConfigError

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple")
INSTRUCTION = (
    'Reply with the right function calls as JSON, such as [{"name": "f", "arguments": {"x": 1}}]. '
    "These functions exist:"
)
OPTIONAL = ""  # among the allowed values of an argument: it may be left out
TYPES = {
    **{"string": str, "any": str, "integer": int, "float": float, "boolean": bool},
    **{"array": list, "tuple": list, "dict": dict},
}

Folder = Annotated[Text, Field(examples=["site-packages/bfcl_eval/data"])]
Split = Literal["train", "test"]
Call = dict[str, dict[str, Any]]  # {function: {argument: its allowed values}}

log = utils.get_logger("INFO")


@checked_arguments("prompts.")
def bfcl(
    path: Folder | None = None,
    split: Split = "test",
    count: Annotated[PositiveInt, Field(examples=[100])] | None = None,
    max_characters: Annotated[PositiveInt, Field(examples=[2000])] = 2000,
) -> list[Example]:
    """The leaderboard's questions as prompts with the first allowed call as reference, in a mixed but fixed order.

    Args:
        path: the folder with the files BFCL_v4_*.json and possible_answer. None: the installed package bfcl-eval.
        split: no function of "test" is in "train".
        count: a prefix of the list. None: all.
        max_characters: leave out questions with longer prompts. 2,000 characters are about 500 tokens.
    """
    folder = _installed() if path is None else Path(path)
    rows = [row for category in CATEGORIES for row in _read(folder, category)]
    held_out = _held_out(rows)
    wanted = [row for row in rows if (row["function"][0]["name"] in held_out) == (split == "test")]
    examples = {row["id"]: _example(row) for row in wanted}
    short = {at: it for at, it in examples.items() if len("".join(it["prompt"].values())) <= max_characters}
    if len(short) < len(examples):
        left_out = len(examples) - len(short)
        log.info(f"bfcl: {left_out} of {len(examples)} {split} questions have over {max_characters} characters")
    return [short[at] for at in sorted(short, key=lambda at: zlib.crc32(at.encode()))][:count]


@checked_arguments("dataset.")
def bfcl_dataset(
    tokenizer: Any,
    path: Folder | None = None,
    split: Split = "train",
    count: Annotated[PositiveInt, Field(examples=[100])] | None = None,
    max_characters: Annotated[PositiveInt, Field(examples=[2000])] = 2000,
) -> ReplyDataset:
    """`bfcl` as conversations in the tokenizer's chat template; the loss counts the calls."""
    return ReplyDataset(tokenizer, bfcl(path, split, count, max_characters))


# ---- reading ----


def _installed() -> Path:
    found = importlib.util.find_spec("bfcl_eval")  # does not import it: its dependencies are many, and not needed
    if found is None or found.origin is None:
        raise ConfigError(
            "prompts.path: null, but the package bfcl-eval, which has the data, is not installed. "
            "Allowed: pip install --no-deps bfcl-eval, or the folder bfcl_eval/data of an unpacked wheel"
        )
    return Path(found.origin).parent / "data"


def _read(folder: Path, category: str) -> list[dict[str, Any]]:
    """The questions of a category with their possible answers as the field `calls`."""
    name = f"BFCL_v4_{category}.json"
    answers = read_json_lines(str(folder / "possible_answer" / name), "prompts.path")
    calls = {answer["id"]: answer["ground_truth"] for _, answer in answers}
    questions = read_json_lines(str(folder / name), "prompts.path")
    return [question | {"calls": calls[question["id"]]} for _, question in questions if question["id"] in calls]


def _held_out(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The functions of the test split: a quarter of the groups, by a hash that is the same on every machine.

    Two functions are in one group if a question offers both, or if a third function is in a group with each.
    """
    group: dict[str, set[str]] = {}
    for row in rows:
        names = [function["name"] for function in row["function"]]
        joined = set().union(*(group.get(name, {name}) for name in names))
        group |= dict.fromkeys(joined, joined)
    first = {id(names): min(names) for names in group.values()}
    return {name for name, names in group.items() if zlib.crc32(first[id(names)].encode()) % 4 == 0}


def _example(row: Mapping[str, Any]) -> Example:
    turns = row["question"][0]
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    functions = [json.dumps(function, ensure_ascii=False, separators=(",", ":")) for function in row["function"]]
    prompt = {
        "system": "\n".join([*system, INSTRUCTION, *functions]),
        "user": "\n".join(turn["content"] for turn in turns if turn["role"] == "user"),
    }
    check = partial(is_right, functions=row["function"], calls=row["calls"])
    return {"prompt": prompt, "response": first_answer(row["function"], row["calls"]), "is_right": check}


# ---- answers ----


def first_answer(functions: Sequence[Mapping[str, Any]], calls: Sequence[Call]) -> str:
    """The first allowed value of each argument that must be given, as JSON on one line."""
    required = {function["name"]: function["parameters"].get("required", []) for function in functions}
    chosen = []
    for name, allowed in ((name, allowed) for call in calls for name, allowed in call.items()):
        arguments = _first_values(allowed, required[name])
        chosen.append({"name": name, "arguments": {key: _inner(value) for key, value in arguments.items()}})
    return json.dumps(chosen, ensure_ascii=False, separators=(",", ":"))


def _first_values(allowed: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    return {
        name: next((value for value in values if value != OPTIONAL), OPTIONAL)
        for name, values in allowed.items()
        if name in required or OPTIONAL not in values
    }


def _inner(value: Any) -> Any:
    """The data also list the allowed values inside an argument that is a dictionary or a list of them."""
    if isinstance(value, list):
        return [_first_values(item) if isinstance(item, dict) else item for item in value]
    return _first_values(value) if isinstance(value, dict) else value


def is_right(output: str, functions: Sequence[Mapping[str, Any]], calls: Sequence[Call]) -> bool:
    """Whether an output makes the possible calls, in any order. It follows the rules of the leaderboard's checker."""
    try:
        made = json.loads(output)
    except (ValueError, RecursionError):
        return False
    if not isinstance(made, list) or len(made) != len(calls):
        return False
    parameters = {function["name"]: function["parameters"] for function in functions}
    for name, allowed in ((name, allowed) for call in calls for name, allowed in call.items()):
        at = next((i for i, call in enumerate(made) if _fits(call, name, allowed, parameters[name])), None)
        if at is None:
            return False
        del made[at]
    return True


def _fits(call: Any, name: str, allowed: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    arguments = call.get("arguments") if isinstance(call, dict) and call.get("name") == name else None
    if not isinstance(arguments, dict) or not arguments.keys() >= {*parameters.get("required", [])}:
        return False
    described = parameters["properties"]
    return _has_fields(arguments, allowed) and all(
        key in described and _is_allowed(value, allowed[key], described[key]) for key, value in arguments.items()
    )


def _has_fields(given: Mapping[str, Any], allowed: Mapping[str, Any]) -> bool:
    """No field is unknown, and only optional ones are missing."""
    return given.keys() <= allowed.keys() and all(OPTIONAL in allowed[key] for key in allowed.keys() - given.keys())


def _is_allowed(value: Any, choices: Sequence[Any], described: Mapping[str, Any]) -> bool:
    """Whether an argument has the described type, or that of its allowed values, and one of these values."""
    kind = TYPES[described["type"]]
    if kind is float and type(value) is int:
        value = float(value)
    of_choices = _type_of(choices) or kind
    if type(value) is not kind or of_choices is not kind:
        return type(value) in (kind, of_choices) and value in choices
    item = TYPES.get(described.get("items", {}).get("type", ""))
    if isinstance(value, list) and item is not None and not any(_have_type(value, item, one) for one in choices):
        return False
    return any(_equals(value, choice) for choice in choices)


def _type_of(choices: Sequence[Any]) -> type | None:
    return next((type(choice) for choice in choices if choice != OPTIONAL), None)


def _have_type(items: Sequence[Any], kind: type, choice: Any) -> bool:
    return not isinstance(choice, list) or all(type(item) in (kind, _type_of(choice)) for item in items)


def _equals(value: Any, choice: Any) -> bool:
    """Texts are equal if they differ only in case, spaces and some punctuation, also inside lists and dictionaries."""
    if isinstance(value, list):
        others = choice or []
        return len(value) == len(others) and all(map(_equals_item, value, others))
    return _equals_item(value, choice)


def _equals_item(value: Any, choice: Any) -> bool:
    if isinstance(value, dict) and isinstance(choice, dict):
        return _has_fields(value, choice) and all(
            _plain(item) in map(_plain, choice[key]) for key, item in value.items()
        )
    return _plain(value) == _plain(choice)


def _plain(value: Any) -> Any:
    return re.sub(r"[ ,./_*^-]", "", value).lower().replace("'", '"') if isinstance(value, str) else value
