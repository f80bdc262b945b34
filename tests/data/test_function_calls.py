"""The public task: questions with function calls, their split, their answers, and how outputs are judged."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from layerskip_recipes.data import function_calls
from layerskip_recipes.data.function_calls import CATEGORIES, bfcl, bfcl_dataset, first_answer, is_right
from layerskip_recipes.data.tokenizer import hf_tokenizer
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.text.prompts import try_examples

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


def write(folder: Path, pairs: list[tuple[dict, dict]]) -> str:
    """The files of the package, all questions in one category."""
    (folder / "possible_answer").mkdir(parents=True)
    for category in CATEGORIES:
        for i, place in enumerate((folder, folder / "possible_answer")):
            lines = [json.dumps(pair[i]) + "\n" for pair in pairs if category == "live_simple"]
            (place / f"BFCL_v4_{category}.json").write_text("".join(lines))
    return str(folder)


def many(count: int, functions: int) -> list[tuple[dict, dict]]:
    """Questions that offer one to three of many functions, and call the first."""
    rng = random.Random(0)
    offered = [[f"f{rng.randrange(functions)}" for _ in range(rng.randint(1, 3))] for _ in range(count)]
    user = {"role": "user", "content": "How warm?"}
    return [question(f"q{i}", names, [{names[0]: {"city": ["Oslo"]}}], [user]) for i, names in enumerate(offered)]


def offered(examples: list[dict]) -> set[str]:
    return {json.loads(line)["name"] for e in examples for line in e["prompt"]["system"].splitlines()[1:]}


def test_no_function_of_the_test_split_is_in_a_training_question(tmp_path):
    path = write(tmp_path, many(300, 600))
    train, test = bfcl(path, "train"), bfcl(path, "test")
    assert len(train) + len(test) == 300 and 20 < len(test) < 150
    assert not offered(train) & offered(test)
    first = bfcl(path, count=10)
    assert [(e["prompt"], e["response"]) for e in first] == [(e["prompt"], e["response"]) for e in test[:10]]


def test_a_prompt_has_the_functions_and_the_leaderboards_own_system_message(tmp_path, caplog, monkeypatch):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Wärme in Oslo?"}]
    long = [{"role": "user", "content": "why " * 500}]
    path = write(tmp_path, [question("a", ["forecast"], CALLS, turns), question("b", ["forecast"], CALLS, long)])
    monkeypatch.setattr(function_calls, "_held_out", lambda rows: {"forecast"})
    with caplog.at_level("INFO"):
        (example,) = bfcl(path)
    assert "1 of 2 test questions have over 2000 characters" in caplog.text
    system = example["prompt"]["system"].splitlines()
    assert (system[0], json.loads(system[2])) == ("Be kind.", FORECAST) and len(system) == 3
    assert example["prompt"]["user"] == "Wärme in Oslo?"
    assert example["is_right"](example["response"]) and not example["is_right"]("[]")
    section = SimpleNamespace(path="bfcl", build=lambda: [example])
    assert try_examples(prompts=section)[0].is_right is example["is_right"]  # it reaches the benchmark


def test_the_loss_counts_the_calls(tmp_path, tokenizer_folder, monkeypatch):
    path = write(tmp_path, many(3, 5))
    monkeypatch.setattr(function_calls, "_held_out", lambda rows: set())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token if not add_generation_prompt }}"
    tokenizer = hf_tokenizer(str(tokenizer_folder), chat_template=template)
    dataset = bfcl_dataset(tokenizer, path)
    assert len(dataset) == 3
    learned = [tokenizer.decode([label for label in sample["labels"] if label != -100]) for sample in dataset]
    assert learned == [example["response"] for example in bfcl(path, "train")]


def test_an_answer_has_the_first_allowed_values_of_what_must_be_given():
    assert json.loads(first_answer([FORECAST], CALLS)) == [{"name": "forecast", "arguments": {"city": "Oslo, NO"}}]
    allowed = {"city": ["", "Bergen"], "days": [3], "place": [{"kind": ["fjord", "sea"], "depth": ["", 5]}]}
    allowed["stops"] = [[{"name": ["Voss", "Flåm"], "wait": ["", 5]}, {"name": ["Myrdal"]}]]
    answer = first_answer([FORECAST], [{"forecast": allowed}, {"forecast": {"city": [""]}}])
    first, second = json.loads(answer)
    stops = [{"name": "Voss"}, {"name": "Myrdal"}]
    assert first["arguments"] == {"city": "Bergen", "days": 3, "place": {"kind": "fjord"}, "stops": stops}
    assert second["arguments"] == {"city": ""} and "\n" not in answer


RIGHT = [
    {"city": "Oslo"},
    {"city": "OSLO - N.O."},  # case, spaces and some punctuation do not count
    {"city": "Oslo", "days": 3, "height": 2},  # an integer in the place of a float
    {"city": "Oslo", "hours": [6, 18]},
    {"city": "Oslo", "place": {"kind": "Sea"}, "stops": [{"name": "bergen"}]},
    {"city": "Oslo", "place": {"kind": "fjord", "depth": 5}},
]
WRONG = [
    {},  # a required argument is missing
    {"city": "Bergen"},
    {"city": "Oslo", "days": 4},
    {"city": "Oslo", "days": 3.0},
    {"city": "Oslo", "days": True},
    {"city": "Oslo", "hours": [18, 6]},
    {"city": "Oslo", "hours": ["6", "18"]},
    {"city": "Oslo", "place": {"depth": 5}},
    {"city": "Oslo", "place": {"kind": "fjord", "name": "x"}},
    {"city": "Oslo", "stops": [{"name": "bergen"}, {"name": "bergen"}]},
    {"city": "Oslo", "unit": "km"},  # not described
    {"city": ["Oslo"]},
]


@pytest.mark.parametrize(("arguments", "right"), [*((a, True) for a in RIGHT), *((a, False) for a in WRONG)])
def test_arguments_are_compared_with_the_allowed_values(arguments, right):
    assert is_right(json.dumps([{"name": "forecast", "arguments": arguments}]), [FORECAST], CALLS) is right


def test_calls_may_come_in_any_order_but_not_more_or_fewer():
    calls = [{"forecast": {"city": ["Oslo"]}}, {"forecast": {"city": ["Voss"]}}]
    oslo, voss = ({"name": "forecast", "arguments": {"city": city}} for city in ("Oslo", "Voss"))

    def judged(*made: object) -> bool:
        return is_right(json.dumps(made), [FORECAST], calls)

    assert judged(oslo, voss) and judged(voss, oslo)
    for made in ([oslo], [oslo, oslo], [oslo, voss, oslo], [oslo, voss | {"name": "f"}], [oslo, 1], [oslo, {}], []):
        assert not judged(*made)
    for text in ("", "Sure!", "{}", "[" * 10_000, json.dumps([oslo, voss])[:-1], "[{]"):
        assert not is_right(text, [FORECAST], calls)
    must = [{"forecast": {"city": ["Oslo"], "days": [3]}}]  # not marked as optional
    assert not is_right(json.dumps([oslo]), [FORECAST], must)


def test_the_command_that_installs_the_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^prompts\.path: null.* not installed.*pip install --no-deps bfcl-eval"):
        bfcl()
    with pytest.raises(ConfigError, match=r"^prompts\.path: .*BFCL_v4_simple_python\.json' cannot be read"):
        bfcl(str(tmp_path))


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
    for category in CATEGORIES:
        for row in function_calls._read(function_calls._installed(), category):
            for change in range(6):
                made = json.loads(first_answer(row["function"], row["calls"]))
                arguments = made[0]["arguments"]
                if change and arguments:
                    key = rng.choice([*arguments])
                    try:
                        arguments[key] = rng.choice(others)(arguments[key])
                    except (TypeError, ValueError):
                        del arguments[key]
                right = is_right(json.dumps(made), row["function"], row["calls"])
                calls = [{call["name"]: call["arguments"]} for call in made]
                theirs = ast_checker(row["function"], calls, row["calls"], Language.PYTHON, category, "x")
                assert right is theirs["valid"], (row["id"], made)
                judged[right] += 1
    assert min(judged.values()) > 2000
