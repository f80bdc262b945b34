"""Print the share of answers that make the right function calls, by the rules of the leaderboard's checker.

    tune run layerskip_generate --config qa/generate data_dir=bfcl prompts.count=null output_file=answers.jsonl
    python examples/check_function_calls.py bfcl/test.jsonl answers.jsonl

function_calls.py wrote bfcl. A call is right if each argument has one of its allowed values.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OPTIONAL = ""  # among the allowed values of an argument: it may be left out
TYPES = {
    **{"string": str, "any": str, "integer": int, "float": float, "boolean": bool},
    **{"array": list, "tuple": list, "dict": dict},
}


def is_right(output: str, functions: Sequence[Mapping[str, Any]], calls: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an output makes the possible calls, in any order."""
    try:
        made = json.loads(output)
    except (ValueError, RecursionError):
        return False
    if not isinstance(made, list) or len(made) != len(calls):
        return False
    parameters = {function["name"]: function["parameters"] for function in functions}
    for name, allowed in ((name, allowed) for call in calls for name, allowed in call.items()):
        at = next((i for i, call in enumerate(made) if fits(call, name, allowed, parameters[name])), None)
        if at is None:
            return False
        del made[at]
    return True


def fits(call: Any, name: str, allowed: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    arguments = call.get("arguments") if isinstance(call, dict) and call.get("name") == name else None
    if not isinstance(arguments, dict) or not arguments.keys() >= {*parameters.get("required", [])}:
        return False
    described = parameters["properties"]
    return has_fields(arguments, allowed) and all(
        key in described and is_allowed(value, allowed[key], described[key]) for key, value in arguments.items()
    )


def has_fields(fields: Mapping[str, Any], allowed: Mapping[str, Any]) -> bool:
    """No field is unknown, and only optional ones are missing."""
    return fields.keys() <= allowed.keys() and all(OPTIONAL in allowed[key] for key in allowed.keys() - fields.keys())


def is_allowed(value: Any, choices: Sequence[Any], described: Mapping[str, Any]) -> bool:
    """Whether an argument has the described type, or that of its allowed values, and one of these values."""
    wanted = TYPES[described["type"]]
    if wanted is float and type(value) is int:
        value = float(value)
    of_choices = type_of(choices) or wanted
    if type(value) is not wanted or of_choices is not wanted:
        return type(value) in (wanted, of_choices) and value in choices
    item = TYPES.get(described.get("items", {}).get("type", ""))
    if isinstance(value, list) and item is not None and not any(have_type(value, item, choice) for choice in choices):
        return False
    return any(equals(value, choice) for choice in choices)


def type_of(choices: Sequence[Any]) -> type | None:
    return next((type(choice) for choice in choices if choice != OPTIONAL), None)


def have_type(items: Sequence[Any], wanted: type, choice: Any) -> bool:
    return not isinstance(choice, list) or all(type(item) in (wanted, type_of(choice)) for item in items)


def equals(value: Any, choice: Any) -> bool:
    """Texts are equal if they differ only in case, spaces and some punctuation, also inside lists and dictionaries."""
    if isinstance(value, list):
        others = choice or []
        return len(value) == len(others) and all(map(equals_item, value, others))
    return equals_item(value, choice)


def equals_item(value: Any, choice: Any) -> bool:
    if isinstance(value, dict) and isinstance(choice, dict):
        return has_fields(value, choice) and all(plain(item) in map(plain, choice[key]) for key, item in value.items())
    return plain(value) == plain(choice)


def plain(value: Any) -> Any:
    return re.sub(r"[ ,./_*^-]", "", value).lower().replace("'", '"') if isinstance(value, str) else value


def read_lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line.strip()]


def main() -> None:
    tests = {json.dumps(line["input"], sort_keys=True): line for line in read_lines(sys.argv[1])}
    answers = read_lines(sys.argv[2])
    right = 0
    for answer in answers:
        test = tests[json.dumps(answer["prompt"], sort_keys=True)]
        right += is_right(answer["text"], test["functions"], test["calls"])
    print(f"{right} of {len(answers)} answers are right ({right / len(answers):.0%})")


if __name__ == "__main__":
    main()
