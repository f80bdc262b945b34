"""Write train.jsonl and test.jsonl for the `qa/*` configs: the Berkeley Function Calling Leaderboard's questions.

    pip install --no-deps bfcl-eval
    python examples/function_calls.py bfcl

    input:  {"system": how to answer, and a line of JSON for each function that the question offers,
             "user": "How warm is it in Oslo, in Celsius?"}
    output: [{"name": "get_weather", "arguments": {"city": "Oslo", "unit": "celsius"}}]
    prediction: calls of the offered functions with made-up arguments, from which drafts are taken

The data are in the package bfcl-eval (Apache 2.0). A second argument names the folder bfcl_eval/data of an unpacked
wheel instead. The split is ours, so results are no score of the leaderboard: about a sixth of the questions are for
testing. No function that they offer is in a training question. Questions with prompts of more than 2,000 characters
(about 500 tokens) are left out. check_function_calls.py judges answers by the fields `functions` and `calls`.
"""

import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qa_files import write_splits

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple")
INSTRUCTION = (
    'Reply with the right function calls as JSON, such as [{"name": "f", "arguments": {"x": 1}}]. '
    "These functions exist:"
)
MAX_CHARACTERS = 2000
OPTIONAL = ""  # among the allowed values of an argument: it may be left out

Call = dict[str, dict[str, Any]]  # {function: {argument: its allowed values}}


# ---- reading ----


def installed_data() -> Path:
    spec = find_spec("bfcl_eval")  # does not import it: its dependencies are many, and not needed
    if spec is None or spec.origin is None:
        sys.exit("The package with the data is missing: pip install --no-deps bfcl-eval")
    return Path(spec.origin).parent / "data"


def read_questions(data: Path, category: str) -> list[dict[str, Any]]:
    """The questions of a category with their possible answers as the field `calls`."""

    def lines(folder: Path) -> list[dict[str, Any]]:
        text = (folder / f"BFCL_v4_{category}.json").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()]

    calls = {answer["id"]: answer["ground_truth"] for answer in lines(data / "possible_answer")}
    return [question | {"calls": calls[question["id"]]} for question in lines(data) if question["id"] in calls]


def held_out_functions(questions: Sequence[Mapping[str, Any]]) -> set[str]:
    """The functions of the test split: a quarter of the groups, by a hash that is the same on every machine.

    Two functions are in one group if a question offers both, or if a third function is in a group with each.
    """
    group: dict[str, set[str]] = {}
    for question in questions:
        names = [function["name"] for function in question["function"]]
        joined = set().union(*(group.get(name, {name}) for name in names))
        group |= dict.fromkeys(joined, joined)
    first = {id(names): min(names) for names in group.values()}
    return {name for name, names in group.items() if zlib.crc32(first[id(names)].encode()) % 4 == 0}


# ---- lines ----


def make_line(question: Mapping[str, Any]) -> dict[str, Any]:
    turns = question["question"][0]
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    asked = {
        "system": "\n".join([*system, INSTRUCTION, *map(as_json, question["function"])]),
        "user": "\n".join(turn["content"] for turn in turns if turn["role"] == "user"),
    }
    return {
        "input": asked,
        "output": first_answer(question["function"], question["calls"]),
        "prediction": likely_calls(question["function"]),
        "functions": question["function"],
        "calls": question["calls"],
    }


def likely_calls(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    """A call of each function with all arguments, and one with those that must be given."""
    calls = []
    for function in functions:
        described = function["parameters"]["properties"]
        for names in ([*described], function["parameters"].get("required", [])):
            arguments = {name: made_up(described[name]) for name in described if name in names}
            calls.append(as_json([{"name": function["name"], "arguments": arguments}]))
    return [*dict.fromkeys(calls)]


def made_up(described: Mapping[str, Any]) -> Any:
    """A value of the described type."""
    if described.get("enum"):
        return described["enum"][0]
    if "properties" in described:
        return {name: made_up(inner) for name, inner in described["properties"].items()}
    if described["type"] in ("array", "tuple"):
        return [made_up(described.get("items") or {"type": "string"})]
    return {"string": "A", "integer": 1, "float": 1.0, "boolean": True, "dict": {}}.get(described["type"], "A")


def first_answer(functions: Sequence[Mapping[str, Any]], calls: Sequence[Call]) -> str:
    """The first allowed value of each argument that must be given, as JSON on one line."""
    required = {function["name"]: function["parameters"].get("required", []) for function in functions}
    chosen = []
    for name, allowed in ((name, allowed) for call in calls for name, allowed in call.items()):
        arguments = first_values(allowed, required[name])
        chosen.append({"name": name, "arguments": {key: inner_value(value) for key, value in arguments.items()}})
    return as_json(chosen)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def first_values(allowed: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    return {
        name: next((value for value in values if value != OPTIONAL), OPTIONAL)
        for name, values in allowed.items()
        if name in required or OPTIONAL not in values
    }


def inner_value(value: Any) -> Any:
    """The data also list the allowed values inside an argument that is a dictionary or a list of them."""
    if isinstance(value, list):
        return [first_values(item) if isinstance(item, dict) else item for item in value]
    return first_values(value) if isinstance(value, dict) else value


def splits(data: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of both splits, in a mixed but fixed order."""
    questions = [question for category in CATEGORIES for question in read_questions(data, category)]
    held_out = held_out_functions(questions)
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for question in sorted(questions, key=lambda question: zlib.crc32(question["id"].encode())):
        line = make_line(question)
        if sum(map(len, line["input"].values())) <= MAX_CHARACTERS:
            lines["test" if question["function"][0]["name"] in held_out else "train"].append(line)
    return lines


def main() -> None:
    folder = Path(sys.argv[1])
    data = Path(sys.argv[2]) if len(sys.argv) > 2 else installed_data()
    write_splits(folder, splits(data), "questions")


if __name__ == "__main__":
    main()
