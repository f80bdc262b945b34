"""Prompts from configs, files and standard input, bad ones among them, and the file of answers."""

import io
import json
import os
import re
from pathlib import Path

import pytest
from helpers.json_lines import task_component, write_lines
from helpers.recipes import run_generate as run

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.generation.text.prompts import Example, refuse_bad, try_examples
from layerskip_recipes.generation.text.text_stream import AnswersInOrder

LINES = [
    '{"prompt": "a = 1"}',
    '{"prompt: "b"}',
    "",
    '{"prompt": ""}',
    '{"prompt": "x = 2"}',
    json.dumps({"prompt": "long " * 99}),
]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ready(path, *overrides):
    return LayerSkipGenerate(load_config(str(path), overrides))


@pytest.fixture
def refused(path, tmp_path):
    """The message with which lines of a prompt file are refused."""

    def refused(lines, *overrides):
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
        with pytest.raises(ValueError) as caught:
            ready(path, f"prompt_file={tmp_path / 'prompts.jsonl'}", *overrides)
        return str(caught.value)

    return refused


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_bad_prompts_are_skipped_and_have_their_place(path, tmp_path, caplog, size):
    """Broken, empty and too long, after a byte order mark; the answers to the others are those that they have alone."""
    file, out, good = (tmp_path / name for name in ("prompts.jsonl", "out.jsonl", "good.jsonl"))
    file.write_text("\n".join(LINES), encoding="utf-8-sig")
    _, report = run(path, f"prompt_file={file}", "on_bad_prompt=skip", f"output_file={out}", f"batch_size={size}")
    run(path, "prompt=[a = 1, x = 2]", f"output_file={good}", f"batch_size={size}")
    alone = zip(map(json.loads, good.read_text().splitlines()), (0, 3), strict=True)
    first, broken, empty, last, long = map(json.loads, out.read_text().splitlines())
    assert [first, last] == [line | {"index": index} for line, index in alone]
    assert (report["prompts"], report["skipped"]) == (2, 3)
    for line, index, number, what in (
        (broken, 1, 2, "no JSON"),
        (empty, 2, 4, "empty"),
        (long, 4, 6, "128 (max_seq_len)"),
    ):
        assert line == {"index": index, "line": number, "error": line["error"]}
        assert what in line["error"] and f"line {number}" in line["error"]
        assert caplog.messages.count(f"skipped: {line['error']}") == 1


def test_a_bad_prompt_is_an_error_that_names_its_line(refused):
    """Each has its own line; the last one says how the others are answered."""
    message = refused([*LINES, '{"prompt": "' + "a" * 110 + '"}'], "max_new_tokens=120")
    assert [re.search(r"prompt_file line (\d)", line)[1] for line in message.splitlines()] == ["2", "4", "6", "7"]
    assert message.endswith("(prompt_file line 7). on_bad_prompt=skip answers the rest")
    message = refused(LINES[:2])
    assert message.startswith('prompt_file line 2: \'{"prompt: "b"}\' is no JSON object')
    assert message.endswith(". on_bad_prompt=skip answers the rest")
    assert "on_bad_prompt" not in refused(LINES[1:2], "on_bad_prompt=skip")  # nothing else to answer
    # Half of a character: JSON can have it, UTF-8 cannot.
    message = refused([LINES[0], '{"prompt": "\\ud83d hi"}', '{"prompt": {"user": "x", "system": "\\ud83d"}}'])
    assert re.match("prompt_file line 2: .* half of a surrogate pair.*\nprompt_file line 3: ", message)
    template = "{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[0].content }}"
    chats = [json.dumps({"prompt": chat}) for chat in ({"user": "a"}, {"user": "a", "system": "b"})]
    assert "no system (prompt_file line 2)." in refused(chats, f"tokenizer.chat_template={json.dumps(template)}")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_predictions_of_json_lines_are_drafted_and_change_no_answer(path, tmp_path, batch_size):
    """From a prompt file and from questions of the `qa/*` configs, whose answers need no prediction."""
    questions = ["a = 1", "import os", "def main(", "x", "class A:", "b"]
    out, keys = tmp_path / "out.jsonl", (f"batch_size={batch_size}", "self_speculation=auto")
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": question} for question in questions])
    _, report = run(path, f"prompt_file={file}", f"output_file={out}", *keys)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert report["drafted"] == 0
    predictions = [line["text"] for line in answers[:3]] + ["no", ["", "no"], None]
    lines = [{"prompt": a, "prediction": b} for a, b in zip(questions, predictions, strict=True)]
    file = write_lines(tmp_path / "prompts.jsonl", lines)
    _, report = run(path, f"prompt_file={file}", f"output_file={out}", *keys)
    assert [json.loads(line) for line in out.read_text().splitlines()] == answers
    assert report["accepted"] > 9
    qa = write_lines(tmp_path / "qa.jsonl", [{"input": line["prompt"], "output": "", **line} for line in lines])
    prompts = ["prompts._component_=layerskip_recipes.tasks.qa_prompts", f"prompts.path={qa}"]
    recipe = ready(path, "prompt=null", *prompts, *keys)
    assert [example.prediction for example in recipe.examples] == predictions and any(recipe.predictions)


def test_bytes_that_are_no_utf8_break_their_line_only(path, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "a\xff"}\n{"prompt": "\xc3\xa9"}\n')
    recipe = ready(path, f"prompt_file={file}", "on_bad_prompt=skip")
    assert recipe.prompts == ["", "é"] and "prompt_file line 1: " in recipe.examples[0].error


def test_a_text_is_one_prompt_and_each_json_line_is_one(path, tmp_path, monkeypatch):
    """A byte order mark is no part of a prompt, and a text is one prompt, whatever it looks like."""
    lines = (
        json.dumps({"prompt": "import sys\n"}) + "\n\n" + json.dumps({"prompt": {"user": "hi", "system": "be brief"}})
    )
    for name in ("one.txt", "two.jsonl", "three.ndjson"):
        (tmp_path / name).write_text(lines, encoding="utf-8-sig")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\ufeff{lines}"))
    for name in ("one.txt", "-"):
        assert ready(path, f"prompt_file={name}").prompts == [lines]
    for name in ("two.jsonl", "three.ndjson"):
        assert ready(path, f"prompt_file={name}").prompts == ["import sys\n", {"user": "hi", "system": "be brief"}]
    (tmp_path / "four.json").write_text(f"[{lines}]")
    with pytest.raises(ValueError, match=r"^prompt_file: 'four\.json' .*prompt_file=four\.jsonl$"):
        ready(path, "prompt_file=four.json")


def test_what_a_prompt_takes_from_other_keys_is_filled_in(path):
    cfg = load_config(str(path), ["prompt=null", 'prompt.user="Tell me about ${max_new_tokens} ${tokenizer.path}"'])
    assert LayerSkipGenerate(cfg).prompts == [{"user": f"Tell me about {cfg.max_new_tokens} {cfg.tokenizer.path}"}]


def test_the_tokenizers_limit_of_a_training_cuts_no_prompt(path):
    limited, free = (
        ready(path, "prompt='x = 1 + 2 + 3 + 4'", f"tokenizer.max_seq_len={limit}") for limit in (4, "null")
    )
    assert limited.prompt_tokens == free.prompt_tokens and len(free.prompt_tokens[0]) > 4
    assert limited.tokenizer.max_seq_len == 4


# ---- the file of answers ----


def test_the_output_file_is_none_that_the_run_reads(path, tmp_path):
    """By whatever name: a link to it, or the same file by another path."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(file)
    tasks = ["prompt=null", "prompts._component_=layerskip_recipes.tasks."]
    for key, others in {
        "prompt_file": [],
        "prompts.path": [tasks[0], tasks[1] + "jsonl"],
        "prompts.source": [tasks[0], tasks[1] + "xsum_summarization"],
    }.items():
        message = rf"^output_file: .* would overwrite {re.escape(key)}\. .*=answers\.jsonl"
        for name in ("a.jsonl", "link.jsonl", f"../{tmp_path.name}/a.jsonl"):
            with pytest.raises(ValueError, match=message):
                ready(path, *others, f"{key}={file}", f"output_file={tmp_path / name}")
    assert file.read_text() == '{"prompt": "a"}\n'


@pytest.mark.parametrize("there", [False, True])
def test_an_output_file_that_cannot_be_written_is_refused(path, tmp_path, monkeypatch, there):
    """A folder or a file without permission, which root, who may run this, would have."""
    protected = tmp_path / "folder"
    protected.mkdir()
    if there:
        (protected / "a.jsonl").touch()
    access = os.access
    monkeypatch.setattr("os.access", lambda name, mode: not Path(name).is_relative_to(protected) and access(name, mode))
    with pytest.raises(ValueError, match=r"^output_file: .* cannot be written"):
        ready(path, f"output_file={protected / 'a.jsonl'}")


def test_an_interrupted_run_replaces_no_earlier_answers(tmp_path):
    out, examples = tmp_path / "a.jsonl", [Example("x"), Example("y")]
    for answers in (1, 2, 0):
        with pytest.raises(KeyboardInterrupt), AnswersInOrder(str(out), examples, print) as file:
            for i in range(answers):
                file.add(i, "z", 1)
            raise KeyboardInterrupt
    lines = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert lines == {"a.jsonl": 1, "a_interrupted.jsonl": 2, "a_interrupted1.jsonl": 0}


def test_an_existing_output_file_needs_no_folder(path, monkeypatch):
    access = os.access
    monkeypatch.setattr("os.access", lambda name, mode: Path(name) != Path("/dev") and access(name, mode))
    GenerateConfig.load(load_config(str(path), ["output_file=/dev/null"]))


# ---- prompts and references of each source ----


def read_examples(*args, **kwargs):
    examples = try_examples(*args, **kwargs)
    refuse_bad(examples)
    return examples


def test_prompts_of_a_task_and_of_json_lines_have_their_responses():
    write_lines("qa.jsonl", [{"q": "question 1?", "a": "answer 1"}, {"q": "question 2?", "a": "answer 2"}])
    templates = {"prompt": "Q: {q}\nA:", "response": " {a}"}
    prompts = task_component("jsonl", path="qa.jsonl", **templates, count=1, chat=True)
    assert read_examples(prompts=prompts) == [Example({"user": "Q: question 1?\nA:"}, " answer 1")]
    lines = [
        {"prompt": "a", "response": "b", "id": 1},
        {"prompt": {"user": "c"}},
        {"prompt": "d", "response": None},
        {"prompt": "e", "response": "", "prediction": ["f", ""]},
    ]
    file = write_lines("p.jsonl", lines)
    expected = [Example("a", "b"), Example({"user": "c"}), Example("d"), Example("e", "", ["f", ""])]
    assert read_examples(prompt_file=file) == expected
    assert read_examples(["a", {"user": "b"}]) == [Example("a"), Example({"user": "b"})]


def test_items_of_a_users_component_are_prompts_or_refused(monkeypatch):
    items = ["a", {"user": "b"}, {"prompt": "c", "response": "d"}]
    monkeypatch.setattr("layerskip_recipes.tasks.human_eval", lambda: items)
    expected = [Example("a"), Example({"user": "b"}), Example("c", "d")]
    assert read_examples(prompts=task_component("human_eval")) == expected
    for wrong, message in (
        (3, "prompts: item 4: 3 is empty or no text"),
        ({"response": "a"}, "prompts: item 4: {'response': 'a'} has no field prompt"),
        ({"prompt": "a", "response": 3}, "prompts: item 4: response 3 is no text"),
    ):
        items[3:] = [wrong]
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            read_examples(prompts=task_component("human_eval"))
    monkeypatch.setattr("layerskip_recipes.tasks.human_eval", lambda: "no list")
    message = r"^prompts: layerskip_recipes.tasks.human_eval returns a str\. Allowed: a list"
    with pytest.raises(ValueError, match=message):
        read_examples(prompts=task_component("human_eval"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "prompt_file line 2: {'text': 'b'} has no field prompt"),
        ("p.jsonl", '{"prompt": "a", "response": 3}\n', "prompt_file line 1: response 3 is no text"),
        ("p.jsonl", '{"prompt": "a", "prediction": [3]}\n', r"prompt_file line 1: prediction: \[3\] is not allowed"),
        ("p.jsonl", '{"prompt": "a", "prediction": "\\ud83d"}\n', "prompt_file line 1: prediction: "),
        ("p.jsonl", "\n\n", "prompt_file: .*no prompt"),
        ("p.txt", "", "prompt_file: ''"),
        ("p.txt", b"\xff\xfe\x00", "prompt_file: .*cannot be read"),
    ],
)
def test_a_broken_prompt_file_is_refused(name, content, message):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="^" + message):
        read_examples(prompt_file=name)
