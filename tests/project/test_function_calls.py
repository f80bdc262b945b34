"""The scripts about function calls: questions, their split, their answers, and how outputs are judged."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from helpers.json_lines import write_lines
from helpers.tools import load

SCRIPT, CHECK = load("function_calls", "examples"), load("check_function_calls", "examples")

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "height": {"type": "float"},
    "hours": {"type": "array", "items": {"type": "integer"}},
    "place": {"type": "dict"},
    "stops": {"type": "array", "items": {"type": "dict"}},
}
FORECAST = {"name": "forecast", "parameters": {"type": "dict", "properties": PROPERTIES, "required": ["city"]}}
CALLS = [
    {
        "forecast": {
            "city": ["Oslo, NO", "Oslo"],
            "days": [3, ""],
            "height": ["", 2.0],
            "hours": [[6, 18], ""],
            "place": [{"kind": ["fjord", "sea"], "depth": ["", 5]}, ""],
            "stops": ["", [{"name": ["Bergen"]}]],
        }
    }
]


def question(at: str, names: list[str], calls: list[dict], turns: list[dict]) -> tuple[dict, dict]:
    functions = [FORECAST | {"name": name} for name in names]
    return {"id": at, "question": [turns], "function": functions}, {"id": at, "ground_truth": calls}


def write(folder: Path, pairs: list[tuple[dict, dict]]) -> Path:
    """The files of the package, all questions in one category."""
    (folder / "possible_answer").mkdir(parents=True)
    for category in SCRIPT.CATEGORIES:
        for i, place in enumerate((folder, folder / "possible_answer")):
            lines = [json.dumps(pair[i]) + "\n" for pair in pairs if category == "live_simple"]
            (place / f"BFCL_v4_{category}.json").write_text("".join(lines))
    return folder


def many(count: int, functions: int) -> list[tuple[dict, dict]]:
    """Questions that offer one to three of many functions, and call the first."""
    rng = random.Random(0)
    offered = [[f"f{rng.randrange(functions)}" for _ in range(rng.randint(1, 3))] for _ in range(count)]
    user = {"role": "user", "content": "How warm?"}
    return [question(f"q{i}", names, [{names[0]: {"city": ["Oslo"]}}], [user]) for i, names in enumerate(offered)]


def offered(lines: list[dict]) -> set[str]:
    return {json.loads(function)["name"] for line in lines for function in line["input"]["system"].splitlines()[1:]}


def test_no_function_of_the_test_split_is_in_a_training_question(tmp_path):
    lines = SCRIPT.splits(write(tmp_path, many(300, 600)))
    assert len(lines["train"]) + len(lines["test"]) == 300 and 20 < len(lines["test"]) < 150
    assert not offered(lines["train"]) & offered(lines["test"])


def test_a_prompt_has_the_functions_and_the_leaderboards_own_system_message(tmp_path, monkeypatch):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Wärme in Oslo?"}]
    too_long = [{"role": "user", "content": "why " * 500}]
    pairs = [question("a", ["forecast"], CALLS, turns), question("b", ["forecast"], CALLS, too_long)]
    monkeypatch.setattr(SCRIPT, "held_out_functions", lambda questions: {"forecast"})
    lines = SCRIPT.splits(write(tmp_path, pairs))
    assert lines["train"] == []
    (line,) = lines["test"]
    system = line["input"]["system"].splitlines()
    assert (system[0], json.loads(system[2])) == ("Be kind.", FORECAST) and len(system) == 3
    assert line["input"]["user"] == "Wärme in Oslo?"
    assert CHECK.is_right(line["output"], line["functions"], line["calls"])


def test_the_answers_of_a_run_are_judged_by_the_question(tmp_path, monkeypatch, capsys):
    """The output file of layerskip_generate has its own order, and the keys of a prompt in another one."""
    data = write(tmp_path / "data", many(40, 600))
    monkeypatch.setattr("sys.argv", ["function_calls.py", str(tmp_path / "bfcl"), str(data)])
    SCRIPT.main()
    assert "test.jsonl: " in capsys.readouterr().out
    tests = [json.loads(line) for line in (tmp_path / "bfcl" / "test.jsonl").read_text().splitlines()][:4]
    answers = [
        {"index": i, "prompt": dict(reversed(line["input"].items())), "text": line["output"] if i else "[]"}
        for i, line in reversed([*enumerate(tests)])
    ]
    file = write_lines(tmp_path / "answers.jsonl", answers)
    monkeypatch.setattr("sys.argv", ["check_function_calls.py", str(tmp_path / "bfcl" / "test.jsonl"), file])
    CHECK.main()
    assert capsys.readouterr().out == "3 of 4 answers are right (75%)\n"


def test_an_answer_has_the_first_allowed_values_of_what_must_be_given():
    assert json.loads(SCRIPT.first_answer([FORECAST], CALLS)) == [
        {"name": "forecast", "arguments": {"city": "Oslo, NO"}}
    ]
    allowed = {"city": ["", "Bergen"], "days": [3], "place": [{"kind": ["fjord", "sea"], "depth": ["", 5]}]}
    allowed["stops"] = [[{"name": ["Voss", "Flåm"], "wait": ["", 5]}, {"name": ["Myrdal"]}]]
    answer = SCRIPT.first_answer([FORECAST], [{"forecast": allowed}, {"forecast": {"city": [""]}}])
    first, second = json.loads(answer)
    stops = [{"name": "Voss"}, {"name": "Myrdal"}]
    assert first["arguments"] == {"city": "Bergen", "days": 3, "place": {"kind": "fjord"}, "stops": stops}
    assert second["arguments"] == {"city": ""} and "\n" not in answer


def test_predictions_are_calls_with_made_up_arguments():
    """With all arguments and with those that must be given."""
    unit = FORECAST | {"parameters": {"properties": {"unit": {"type": "string", "enum": ["km", "mi"]}}}}
    whole, required, given, empty = map(json.loads, SCRIPT.likely_calls([FORECAST, unit | {"name": "other"}]))
    assert [call["name"] for (call,) in (whole, required, given, empty)] == ["forecast"] * 2 + ["other"] * 2
    assert whole[0]["arguments"].keys() == PROPERTIES.keys() and [*required[0]["arguments"]] == ["city"]
    for name, value in whole[0]["arguments"].items():
        assert CHECK.is_allowed(value, [value], PROPERTIES[name])
    assert given[0]["arguments"] == {"unit": "km"} and empty[0]["arguments"] == {}
    assert len(SCRIPT.likely_calls([FORECAST | {"parameters": {"properties": {}}}])) == 1


RIGHT = [
    {"city": "Oslo"},
    {"city": "OSLO - N.O."},  # case, spaces and some punctuation do not count
    {"city": "Oslo", "days": 3, "height": 2},  # an integer in the place of a float
    {"city": "Oslo", "hours": [6, 18]},
    {"city": "Oslo", "place": {"kind": "Sea"}, "stops": [{"name": "bergen"}]},
]
WRONG = [
    {},  # a required argument is missing
    {"city": "Bergen"},
    {"city": "Oslo", "days": 4},
    {"city": "Oslo", "days": 3.0},
    {"city": "Oslo", "hours": [18, 6]},
    {"city": "Oslo", "place": {"kind": "fjord", "name": "x"}},
    {"city": "Oslo", "stops": [{"name": "bergen"}, {"name": "bergen"}]},
    {"city": "Oslo", "unit": "km"},  # not described
]


@pytest.mark.parametrize(("arguments", "right"), [*((a, True) for a in RIGHT), *((a, False) for a in WRONG)])
def test_arguments_are_compared_with_the_allowed_values(arguments, right):
    assert CHECK.is_right(json.dumps([{"name": "forecast", "arguments": arguments}]), [FORECAST], CALLS) is right


def test_calls_may_come_in_any_order_but_not_more_or_fewer():
    calls = [{"forecast": {"city": ["Oslo"]}}, {"forecast": {"city": ["Voss"]}}]
    oslo, voss = ({"name": "forecast", "arguments": {"city": city}} for city in ("Oslo", "Voss"))

    def judged(*made: object) -> bool:
        return CHECK.is_right(json.dumps(made), [FORECAST], calls)

    assert judged(oslo, voss) and judged(voss, oslo)
    for made in ([oslo], [oslo, oslo], [oslo, voss, oslo], [oslo, voss | {"name": "f"}], [oslo, 1], [oslo, {}], []):
        assert not judged(*made)
    for text in ("", "Sure!", "{}", "[" * 10_000, json.dumps([oslo, voss])[:-1], "[{]"):
        assert not CHECK.is_right(text, [FORECAST], calls)
    must = [{"forecast": {"city": ["Oslo"], "days": [3]}}]  # not marked as optional
    assert not CHECK.is_right(json.dumps([oslo]), [FORECAST], must)


def test_the_command_that_installs_the_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(SCRIPT, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["function_calls.py", str(tmp_path / "bfcl")])
    with pytest.raises(SystemExit, match="pip install --no-deps bfcl-eval"):
        SCRIPT.main()
    assert not (tmp_path / "bfcl").exists()


@pytest.mark.real
def test_outputs_are_judged_as_by_the_leaderboards_checker(monkeypatch):
    """First answers, and answers in which values are missing, moved or of another type."""
    if importlib.util.find_spec("bfcl_eval") is None:
        pytest.skip("bfcl-eval is not installed")
    models = ModuleType("bfcl_eval.constants.model_config")  # needs the clients of all services
    models.MODEL_CONFIG_MAPPING = {"x": SimpleNamespace(underscore_to_dot=False)}
    monkeypatch.setitem(sys.modules, models.__name__, models)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    rng, judged = random.Random(0), {True: 0, False: 0}
    others = [str.upper, str, lambda v: v + 1, lambda v: [v], lambda v: v[:-1], lambda v: v[::-1], float, lambda v: {}]
    for category in SCRIPT.CATEGORIES:
        for row in SCRIPT.read_questions(SCRIPT.installed_data(), category):
            for change in range(6):
                made = json.loads(SCRIPT.first_answer(row["function"], row["calls"]))
                arguments = made[0]["arguments"]
                if change and arguments:
                    key = rng.choice([*arguments])
                    try:
                        arguments[key] = rng.choice(others)(arguments[key])
                    except (TypeError, ValueError):
                        del arguments[key]
                right = CHECK.is_right(json.dumps(made), row["function"], row["calls"])
                calls = [{call["name"]: call["arguments"]} for call in made]
                theirs = ast_checker(row["function"], calls, row["calls"], Language.PYTHON, category, "x")
                assert right is theirs["valid"], (row["id"], made)
                judged[right] += 1
    assert min(judged.values()) > 2000
