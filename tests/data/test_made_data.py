"""Data made without a download: commands with their parses, functions with their index entries, and prompts."""

import json
import re

import pytest

from layerskip_recipes.data import standard_library
from layerskip_recipes.data.commands import _GRAMMAR, TEMPLATES, VALUES, command_dataset, commands
from layerskip_recipes.errors import ConfigError


def slot_values(examples: list[dict]) -> set[str]:
    return {value for e in examples for value in re.findall(r"\[SL:\w+ ([^\[\]]+?) \]", e["response"])}


def test_a_parse_brackets_the_words_of_its_command():
    for example in commands(300):
        parse = example["response"]
        assert re.sub(r"\[(IN|SL):[A-Z_]+ | \]", "", parse) == example["prompt"]["user"]
        assert parse.count("[") == parse.count("]") >= 2 and not set("{}()|") & set(parse)


def test_many_commands_are_distinct_seeded_and_held_out():
    train, test = commands(40_000, "train"), commands(500, "test")
    texts = {example["prompt"]["user"] for example in train}
    assert len(texts) == 40_000
    assert commands(10, "train") == train[:10] != commands(10, "train", seed=1)
    # Every test command has a slot value that no training command has.
    split = [values for values in VALUES.values() if isinstance(values, dict)]
    shown, held_out = ({value for values in split for value in values[name]} for name in ("train", "test"))
    assert not shown & held_out and min(len(values["test"]) for values in split) >= 14
    seen = slot_values(train)
    assert all(slot_values([example]) - seen for example in test)
    assert len({e["response"].split()[0] for e in test}) >= 20  # intents
    assert command_dataset(None, "test", 3).examples == test[:3]


def words(texts: object) -> set[str]:
    return {*re.findall(r"[a-z]+", json.dumps(texts))}


def test_training_shows_other_words_but_none_that_is_held_out():
    split = [values for values in VALUES.values() if isinstance(values, dict)]
    common = [TEMPLATES, *(values for values in VALUES.values() if values not in split)]
    known = {name: words([common, *(values[name] for values in split)]) for name in ("train", "test")}
    train, test = ([words(e["prompt"]["user"]) for e in commands(2000, name)] for name in ("train", "test"))
    assert all(command <= known["test"] for command in test)
    assert not any(command & (known["test"] - known["train"]) for command in train)
    # Two fifths of a command's one to four values: half of the other words are from the list, half are invented.
    other = set().union(*train) - known["train"]
    assert len(other & set(_GRAMMAR["words"])) > 300 and len(other - set(_GRAMMAR["words"])) > 500
    assert 0.4 < sum(not command <= known["train"] for command in train) / 2000 < 0.7


def test_an_index_entry_says_what_a_function_takes_and_calls(monkeypatch):
    texts = {
        "train": "def f(a, *, b=1):\n    g(a)\n    return g(b.c(a))\n",
        "heldout": "class A:\n    @staticmethod\n    def h():\n        'Doc.'\n\n    def long(self):\n"
        + "        pass\n" * 40,
    }
    monkeypatch.setattr(standard_library, "stdlib_texts", lambda split: {"module.py": texts[split]})
    (train,), (test,) = (standard_library.code_index(split=split) for split in ("train", "test"))
    assert train["prompt"]["user"].endswith("\n" + texts["train"].rstrip())
    entry = {"function": "f", "parameters": ["a", "b"], "returns": True, "calls": ["g", "b.c"]}
    assert json.loads(train["response"]) == entry
    assert test["prompt"]["user"].endswith("\ndef h():\n    'Doc.'")
    assert json.loads(test["response"]) == {"function": "h", "parameters": [], "returns": False, "calls": []}


def test_prompts_have_the_length_asked_for():
    prompts = standard_library.heldout_prompts(count=3, characters=200)
    assert [len(prompt) for prompt in prompts] == [200] * 3 and len({*prompts}) == 3
    assert all(prompt.rstrip().endswith(":") for prompt in prompts)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (commands, {"count": 0}, r"^prompts\.count: 0 "),
        (commands, {"split": "dev"}, r"^prompts\.split: 'dev' .*train, test"),
        (standard_library.heldout_prompts, {"count": 9999}, r"^prompts\.count: 9999 .* of 1 to \d+; for example "),
        (standard_library.heldout_prompts, {"characters": 10**9}, r"^prompts\.count: 8 .*of 1 to 0"),
    ],
)
def test_mistakes(make, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**arguments)
