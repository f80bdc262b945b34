"""The prompts and references of a config: from the config itself, from files, from components."""

import json
import re
from pathlib import Path

import pytest
from helpers.json_lines import task_component, write_lines

from layerskip_recipes.generation.text.prompts import Example, refuse_bad, try_examples

QUESTIONS = [{"q": f"question {i}?", "a": f"answer {i}"} for i in range(1, 6)]
TEMPLATES = {"prompt": "Q: {q}\nA:", "response": " {a}"}


def read_examples(*args, **kwargs):
    examples = try_examples(*args, **kwargs)
    refuse_bad(examples)
    return examples


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_examples_of_a_config():
    write_lines("qa.jsonl", QUESTIONS)
    prompts = task_component("jsonl", path="qa.jsonl", **TEMPLATES, count=1, chat=True)
    asked = {"user": "Q: question 1?\nA:"}
    assert read_examples(prompts=prompts) == [Example(asked, " answer 1")]
    lines = [
        {"prompt": "a", "response": "b", "id": 1},
        {"prompt": {"user": "c"}},
        {"prompt": "d", "response": None},
        {"prompt": "e", "response": ""},
    ]
    file = write_lines("p.jsonl", lines)
    assert read_examples(prompt_file=file) == [
        Example("a", "b"),
        Example({"user": "c"}),
        Example("d"),
        Example("e", ""),
    ]
    assert read_examples(["a", {"user": "b"}]) == [Example("a"), Example({"user": "b"})]


def test_an_example_knows_its_line():
    """Empty lines count, as in an editor."""
    Path("p.jsonl").write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [example.line for example in read_examples(prompt_file="p.jsonl")] == [2, 4]


def test_items_of_a_component(monkeypatch):
    items = ["a", {"user": "b"}, {"prompt": "c", "response": "d"}]
    monkeypatch.setattr("layerskip_recipes.tasks.human_eval", lambda: items)
    assert read_examples(prompts=task_component("human_eval")) == [
        Example("a"),
        Example({"user": "b"}),
        Example("c", "d"),
    ]
    for wrong, message in {
        "": "prompts: item 4: '' is empty",
        3: "prompts: item 4: 3 is empty or no text",
        '{"response": "a"}': "prompts: item 4: {'response': 'a'} has no field prompt",
        '{"prompt": "a", "response": 3}': "prompts: item 4: response 3 is no text",
    }.items():
        items[3:] = [json.loads(wrong) if str(wrong).startswith("{") else wrong]
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            read_examples(prompts=task_component("human_eval"))
    monkeypatch.setattr("layerskip_recipes.tasks.human_eval", lambda: "no list")
    with pytest.raises(
        ValueError, match=r"^prompts: layerskip_recipes.tasks.human_eval returns a str\. Allowed: a list"
    ):
        read_examples(prompts=task_component("human_eval"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "response": 3}, "prompt_file line 2: response 3 is no text"),
        ({"response": "a"}, "prompt_file line 2: {'response': 'a'} has no field prompt"),
        ({"prompt": 3, "response": "a"}, "prompt_file line 2: 3 is empty or no text"),
    ],
)
def test_a_broken_line_of_a_prompt_file(line, message):
    file = write_lines("p.jsonl", [{"prompt": "a"}, line])
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        read_examples(prompt_file=file)
